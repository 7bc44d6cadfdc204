"""Names and sizes of the dtypes that weight files hold."""

from __future__ import annotations

import numpy as np

NUMPY_CODES = {
    **{"float64": "f8", "float32": "f4", "float16": "f2", "complex64": "c8", "complex128": "c16"},
    **{"uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "bool": "?"},
    **{"int8": "i1", "int16": "i2", "int32": "i4", "int64": "i8"},
}
# Types that NumPy lacks: ml_dtypes has them, but for complex32.
EXTENSION_SIZES = {
    **{"bfloat16": 2, "complex32": 4},
    **{"float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1},
    "float8_e8m0fnu": 1,
}
QUANTISED_SIZES = {"quint8": 1, "qint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
_OTHER_SIZES = {
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
    **{"bits1x8": 1, "bits2x4": 1, "bits4x2": 1, "bits8": 1, "bits16": 2},
    "float4_e2m1fn_x2": 1,
}
SIZES = {
    **{name: np.dtype(code).itemsize for name, code in NUMPY_CODES.items()},
    **EXTENSION_SIZES,
    **QUANTISED_SIZES,
    **_OTHER_SIZES,
}
ALIASES = {
    **{"float": "float32", "double": "float64", "half": "float16", "long": "int64"},
    **{"int": "int32", "short": "int16", "cfloat": "complex64", "cdouble": "complex128"},
    "chalf": "complex32",
}
# The classes `torch.FloatStorage`, `torch.FloatTensor` and their kind.
CLASSES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
    **{"Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64"},
    **{"ComplexHalf": "complex32", "QUInt8": "quint8", "QInt8": "qint8", "QInt32": "qint32"},
    **{"QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4", "Untyped": "uint8"},
}
SAFETENSORS_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "C64": "complex64"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}

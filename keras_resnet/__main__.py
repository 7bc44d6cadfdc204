"""`python -m keras_resnet` is `keras-resnet`."""

import sys

from keras_resnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

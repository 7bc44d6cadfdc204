"""torch.export's programs: described and run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from keras_resnet.runtimes.formats import METADATA_FILE, to_json
from keras_resnet.runtimes.runner import FileRunner, sizes


class Runner(FileRunner):
    """torch on an exported program, a `.pt2` file; Keras is not asked."""

    runtime = "torch"
    reads = ("torch",)

    def _open(self, path, precision, threads):
        import torch
        from torch.export.passes import move_to_device_pass

        about = {METADATA_FILE: ""}
        program = torch.export.load(path, extra_files=about)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device != "cpu":  # what `finish` leaves
            program = move_to_device_pass(program, self._device)
            self.name += f" on {torch.cuda.get_device_name()}"
        self._module = program.module()
        nodes = {node.name: node for node in program.graph.nodes}
        names = program.graph_signature.user_inputs[0], program.graph_signature.user_outputs[0]
        return about[METADATA_FILE], *(sizes(nodes[name].meta["val"].shape) for name in names)

    def _run(self, images):
        import torch

        with torch.inference_mode():
            return self._module(torch.from_numpy(images).to(self._device)).cpu().numpy()

    needs_room = True

    @staticmethod
    def finish(path: Path, description: dict[str, Any]) -> None:
        """Moves it to the CPU, drops what is stored twice, and writes the description."""
        import torch
        from torch.export.graph_signature import InputKind
        from torch.export.passes import move_to_device_pass

        # Where a GPU made it, its constants and the devices in its graph are that GPU's.
        program = move_to_device_pass(torch.export.load(path), "cpu")
        # Keras' variables come twice: as constants, which the graph uses, and as the parameters of
        # the module, which it does not. Without those the file has half the size.
        nodes, inputs = {node.name: node for node in program.graph.nodes}, program.graph_signature
        for spec in list(inputs.input_specs):
            if spec.kind is InputKind.PARAMETER and not nodes[spec.arg.name].users:
                program.graph.erase_node(nodes[spec.arg.name])
                inputs.input_specs.remove(spec)
                del program.state_dict[spec.target]
        for node in program.graph.nodes:  # the lines of Keras, by where it is installed here
            node.meta.pop("stack_trace", None)
        program.graph_module.recompile()
        fresh = path.with_name(f"new-{path.name}")
        torch.export.save(program, fresh, extra_files={METADATA_FILE: to_json(description)})
        os.replace(fresh, path)

    @staticmethod
    def options(batch_size: int | None) -> dict[str, Any]:
        """Leaves the batch free."""
        import torch

        free = {"dynamic_shapes": {0: torch.export.Dim("batch", min=1)}}
        return free if batch_size is None else {}

"""Makes a peer's own files of a Hugging Face folder, without a network: convert.py KIND FOLDER TARGET.

KIND: "ctranslate2" (int8) or "openvino" (8-bit weights).
"""

import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def ctranslate2(folder: str, target: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(folder).convert(target, quantization="int8")


def openvino(folder: str, target: str) -> None:
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", folder]
    subprocess.run([*command, "--task", "text-generation-with-past", "--weight-format", "int8", target], check=True)


kind, folder, target = sys.argv[1:]
{"ctranslate2": ctranslate2, "openvino": openvino}[kind](folder, target)

"""KerasHub's own classes on folders that gemkit wrote: leaves the logits [T, V] of each as ``logits.npy`` in it.

Usage: python keras_hub_worker.py FOLDER ...; each folder has ``tokens.npy``.
"""

import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np

for name in sys.argv[1:]:
    folder = Path(name)
    tokens = np.load(folder / "tokens.npy")[None].astype(np.int32)
    backbone = keras_hub.models.Backbone.from_preset(str(folder), dtype="float32")
    hidden = backbone({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    logits = backbone.token_embedding(hidden, reverse=True)
    np.save(folder / "logits.npy", keras.ops.convert_to_numpy(keras.ops.stop_gradient(logits))[0])
    print(type(backbone).__name__)

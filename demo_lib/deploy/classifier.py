"""The model that is served: raw images in, class names and probabilities out.

MLflow copies this file into the model ("models from code"), so nothing is pickled and it needs no `demo_lib`.
"""

import mlflow
import numpy as np
import pandas as pd
import torch


class FashionClassifier(mlflow.pyfunc.PythonModel):
    """Wraps the logged network `network` and names its outputs by `classes` of the model's configuration."""

    def load_context(self, context):
        """Load the network, once for each process that serves the model."""
        network = mlflow.pytorch.load_model(context.artifacts["network"])
        self.network = network.to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
        self.classes = context.model_config["classes"]

    def predict(self, context, model_input: np.ndarray, params: dict | None = None) -> pd.DataFrame:
        """Return one row an image (uint8, N x 28 x 28): its `label`, then a probability for each class."""
        images = torch.from_numpy(model_input.copy()).unsqueeze(1)  # PyTorch warns of read-only arrays
        with torch.inference_mode():
            logits = torch.cat([self.network(part / 255) for part in images.split(500)])
        probabilities = logits.softmax(dim=1).numpy()
        frame = pd.DataFrame(probabilities, columns=self.classes)
        frame.insert(0, "label", [self.classes[best] for best in probabilities.argmax(axis=1)])
        return frame


mlflow.models.set_model(FashionClassifier())

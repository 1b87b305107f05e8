"""Networks in PLSC's words."""

from plsc.models.base_model import BaseModel
from plsc.models.resnet import ResNet, ResNet50, ResNet101, ResNet152

__all__ = ["BaseModel", "ResNet", "ResNet50", "ResNet101", "ResNet152"]

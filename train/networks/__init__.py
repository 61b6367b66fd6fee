"""The networks: CoCosNet with its two halves, the discriminator, and VGG19 for the losses."""

from .cocosnet import CoCosNet, ModelOutput
from .discriminator import Discriminator
from .initialization import initialize
from .vgg import Vgg19

__all__ = ["CoCosNet", "Discriminator", "ModelOutput", "Vgg19", "initialize"]

"""The networks: CoCosNet with its two halves, the discriminator, and VGG19 for the losses."""

from .cocosnet import CoCosNet, Translation
from .discriminator import Discriminator
from .initialisation import initialise
from .vgg import Vgg19

__all__ = ["CoCosNet", "Discriminator", "Translation", "Vgg19", "initialise"]

"""Loaders of real data; downloads are checked by md5 and never happen on import."""

from sequel.data.cifar import cifar10, cifar100, tiny_imagenet
from sequel.data.digits import digits
from sequel.data.idx import fashion, kmnist, mnist, mnist_test

__all__ = [
    "cifar10",
    "cifar100",
    "digits",
    "fashion",
    "kmnist",
    "mnist",
    "mnist_test",
    "tiny_imagenet",
]

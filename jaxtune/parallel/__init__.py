"""Devices: the mesh, how arrays are cut over it, several processes, and what differs between platforms."""

from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.sharding import constrain, named_sharding, partition_spec, place, replicated

__all__ = ["constrain", "make_mesh", "named_sharding", "partition_spec", "place", "replicated"]

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxtune.errors import UserError
from jaxtune.parallel import make_mesh, partition_spec


def test_an_open_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"trial": 1, "data": len(jax.devices()) // 4, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "part"),
    [
        ({"data": 3}, "does not fit"),
        ({"data": -1, "fsdp": 3}, "does not fit"),
        ({"data": -1, "fsdp": -1}, "only one axis"),
        ({"data": 0}, "parallel.data = 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told(sizes, part):
    with pytest.raises(UserError, match=part):
        make_mesh(**sizes)


def test_a_mesh_axis_is_used_once_and_only_where_it_divides():
    mesh = make_mesh(2, 2, 2)
    assert partition_spec(("embed", "heads"), (8, 8), mesh) == PartitionSpec("fsdp", "tensor")
    assert partition_spec(("batch", "sequence", "embed"), (8, 4, 8), mesh) == PartitionSpec(
        ("data", "fsdp"), None, None
    )
    assert partition_spec(("embed", "kv_heads"), (8, 3), mesh) == PartitionSpec("fsdp", None)
    with pytest.raises(ValueError, match="logical axes"):
        partition_spec(("embed",), (8, 8), mesh)

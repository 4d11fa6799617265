"""The networks that are trained: published sizes, torchvision's logits, PyTorch's files, and what becomes sparse."""

import importlib.util
import io
import json
import pickle
import struct
import zipfile
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import nm_jax as nm
from experiments.networks import ARCHITECTURES, VGG, Architecture, ImageNetResNet, ResNet, torch_weights
from tests.experiments import torchvision_logits as golden

PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnext50_32x4d": 25_028_904,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
}
VGG_LAYERS = (16, 0, 32, 32, 0, 64, 0)
SMALL = {
    "basic": Architecture(ImageNetResNet((1, 2, 1, 1), bottleneck=False, classes=10)),
    "grouped": Architecture(ImageNetResNet((1, 2, 1, 1), groups=32, group_width=4, classes=10)),
    "vgg": Architecture(VGG(VGG_LAYERS, hidden=32, classes=10), flattened={"classifier_0": 49}),
    "vgg_bn": Architecture(VGG(VGG_LAYERS, True, 32, 10), flattened={"classifier_0": 49}),
}
GOLDEN = json.loads(golden.FILE.read_text())


def shapes(module, side):
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images), images


def apply(module, variables, **options):
    return jax.jit(lambda v, x: module.apply(v, x, **options))(variables, jnp.asarray(golden.images()))


def close(found, wanted, tolerance=1e-5):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name):
    variables, _ = shapes(ARCHITECTURES[name].module, 224)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PUBLISHED[name]


@pytest.mark.parametrize("name", SMALL)
def test_logits_and_statistics_of_torchvision(name):
    """Recorded from torchvision, with the same weights; in training, the statistics of a batch norm too."""
    known = SMALL[name]
    variables = known.variables(golden.state_dict(known.module))
    close(apply(known.module, variables), GOLDEN[name]["logits"])
    if "train" in GOLDEN[name]:
        logits, extra = apply(known.module, variables, train=True, mutable=["batch_stats"])
        close(logits, GOLDEN[name]["train"], 1e-4)
        found = extra["batch_stats"]["layer1_0"]["bn2"]
        close(found["mean"][:8], GOLDEN[name]["mean"])
        before = variables["batch_stats"]["layer1_0"]["bn2"]["var"][:8]
        count = 2 * (golden.SIDE // 4) ** 2  # the new part is of n - 1 there, of n here
        close(0.9 * before + (found["var"][:8] - 0.9 * before) * count / (count - 1), GOLDEN[name]["var"])


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.FULL)
def test_logits_of_the_whole_networks(name):
    known = ARCHITECTURES[name]
    variables = known.variables(golden.state_dict(known.module, side=224))
    close(apply(known.module, variables)[:, :10], GOLDEN[name]["logits"])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="torchvision is not installed")
@pytest.mark.parametrize("name", GOLDEN)
def test_what_was_recorded_is_what_torchvision_gives(name):
    found = golden.record(name)
    for key, value in GOLDEN[name].items():
        close(found[key], value)


@pytest.mark.parametrize("name", [*SMALL, "cifar10_resnet20", "cifar100_resnet8"])
def test_computing_in_bfloat16_keeps_parameters_and_logits_in_float32(name):
    known = SMALL.get(name) or ARCHITECTURES[name]
    module = known.module.clone(dtype=jnp.bfloat16)
    variables, images = shapes(module, 32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    traced = jax.make_jaxpr(module.apply)(variables, images)
    assert [value.dtype for value in traced.out_avals] == [jnp.float32]
    products = [e for e in traced.jaxpr.eqns if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert {e.outvars[0].aval.dtype for e in products} <= {jnp.dtype(jnp.bfloat16)}
    assert "bf16" in str(traced)


def planned(name, pattern):
    known = ARCHITECTURES[name]
    variables, images = shapes(known.module, known.side)
    params = variables.pop("params")
    plan = nm.plan(
        lambda p, v, x: known.module.apply({"params": p, **v}, x), params, variables, images, pattern=pattern
    )
    return {leaf.path: leaf for leaf in plan.leaves if leaf.path.endswith("kernel")}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "cifar10_resnet20"])
def test_all_but_the_first_and_the_last_layer_become_sparse(name):
    kernels = planned(name, "2:4-T")
    dense = {path: leaf.reason for path, leaf in kernels.items() if leaf.pattern is None}
    assert sorted(dense.values()) == ["the first layer", "the last layer"]
    assert next(path for path, reason in dense.items() if "first" in reason) in ("conv1/kernel", "features_0/kernel")
    for path, leaf in kernels.items():
        assert leaf.axes == ("io" if "classifier" in path or path in ("fc/kernel", "linear/kernel") else "bbio")


def test_groups_with_fewer_channels_than_a_block_stay_dense():
    """ResNeXt-50 has 4 channels in a group of the first stage, 8 in the second: blocks of 8 fit these alone."""
    kernels = planned("resnext50_32x4d", "4:8-T")
    dense = {path for path, leaf in kernels.items() if leaf.pattern is None}
    assert dense == {"conv1/kernel", "fc/kernel", *(f"layer1_{k}/conv2/kernel" for k in range(3))}


# ------------------------------------------------------------------------------------------------------------ files

STORED = {"conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "conv.bias": np.arange(2.0)}


class _Global:
    """Pickles as the name of a function or class of a package that need not be there."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return self.name


class _Pickler(pickle._Pickler):
    """Writes what PyTorch writes: storages by their keys, tensors as calls."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_global(self, obj, name=None):
        module, name = obj.name.rsplit(".", 1)
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    dispatch[_Global] = save_global

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, _Storage) else None


class _Storage:
    def __init__(self, key, array):
        kind = {"float32": "FloatStorage", "float64": "DoubleStorage"}[array.dtype.name]
        self.pid = ("storage", _Global(f"torch.{kind}"), key, "cpu", array.size)


class _Call:
    def __init__(self, storage, array):
        self.storage, self.array = storage, array

    def __reduce__(self):
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        return _Function(), (self.storage, 0, self.array.shape, strides, False, {})


class _Function(_Global):
    def __init__(self):
        super().__init__("torch._utils._rebuild_tensor_v2")

    def __call__(self):
        raise AssertionError("only its name is pickled")


_Pickler.dispatch[_Function] = _Pickler.save_global


def pickled(value):
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def write_zip(path, wrap):
    tensors = {name: _Call(_Storage(str(k), a), a) for k, (name, a) in enumerate(STORED.items())}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled(wrap(tensors)))
        for k, array in enumerate(STORED.values()):
            file.writestr(f"archive/data/{k}", array.tobytes())


def write_plain(path, wrap):
    tensors = {name: _Call(_Storage(str(k), a), a) for k, (name, a) in enumerate(STORED.items())}
    parts = [pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [pickled(wrap(tensors)), pickle.dumps(["0", "1"], protocol=2)]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in STORED.values()]
    path.write_bytes(b"".join(parts))


@pytest.mark.parametrize("wrap", [dict, lambda tensors: {"state_dict": tensors}], ids=["plain", "wrapped"])
@pytest.mark.parametrize("write", [write_zip, write_plain])
def test_files_of_pytorch_are_read_without_it(tmp_path, write, wrap):
    write(tmp_path / "w.pth", wrap)
    found = torch_weights.read(tmp_path / "w.pth")
    assert found.keys() == STORED.keys()
    for name, array in STORED.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_pytorch_has_written(tmp_path, zipped):
    import torch

    base = torch.arange(24.0).reshape(4, 6)
    saved = {"a": base, "b": base.T[1:3], "c": torch.nn.Parameter(base.bfloat16()), "d": torch.tensor(3)}
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    found = torch_weights.read(tmp_path / "w.pth")
    for name, tensor in saved.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.detach().float().numpy())


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_other_files_of_arrays(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    np.savez(path, **STORED) if suffix == "npz" else save_file(STORED, path)
    for name, array in torch_weights.read(path).items():
        np.testing.assert_array_equal(array, STORED[name], strict=True)


def test_files_that_are_no_state_dict_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(ValueError, match=r"w\.pth: there is no such file"):
        torch_weights.read(path)
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"w\.pth: no state dict .* it has a builtins\.print"):
        torch_weights.read(path)
    write_zip(path, lambda tensors: {"model": tensors, "epoch": 3})
    with pytest.raises(ValueError, match=r"w\.pth: it has more than tensors by name"):
        torch_weights.read(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"w\.pth: no state dict of PyTorch"):
        torch_weights.read(path)


TINY = Architecture(ResNet((1, 1), (4, 8), 4, 5, projection=False, relu_every_block=True, pool=None), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.bias": None}, "params/linear/bias is missing, ResNet wants"),
        ({"linear.bias": np.zeros(7)}, r"params/linear/bias has shape \(7,\), ResNet wants \(5,\)"),
        ({"layer9.0.conv1.weight": np.zeros((4, 4, 3, 3))}, "layer9_0/conv1/kernel .* ResNet has no such parameter"),
    ],
    ids=["missing", "shape", "more"],
)
def test_weights_of_another_network_are_refused(change, message):
    weights = golden.state_dict(TINY.module, 16)
    assert TINY.variables({f"module.{name}": array for name, array in weights.items()})
    changed = {name: array for name, array in (weights | change).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        TINY.variables(changed)

"""What only a CUDA device can show: the same numbers there as here, and mixed precision."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import MASK_SYSTEMS, ROOT, SYSTEMS, make_batch
from detectron2.utils.events import EventStorage
from layers.op_cases import make_fused_inputs, make_inputs

from dn_detr_d2.engine import TrainStep
from dn_detr_d2.inference import accelerate
from dn_detr_d2.layers import ms_deform_attn, ms_deform_attn_fused
from dn_detr_d2.layers.position_encoding import encode_boxes
from dn_detr_d2.structures import HostCopy

# Deterministic algorithms need it; cuBLAS and PyTorch read it once, at the first product of the process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def there(*tensors):
    """Leaves on the GPU."""
    return [x.detach().cuda().requires_grad_() for x in tensors]


def forward_and_gradients(function, tensors, upstream_dtype=torch.float64):
    """(output, gradients) on the CPU; the gradient of the output is a fixed pattern, in numbers that the type has."""
    out = function(*tensors)
    upstream = torch.linspace(-1, 1, max(1, out.numel()), dtype=torch.float64)[: out.numel()].view(out.shape)
    upstream = upstream.to(upstream_dtype)
    upstream = upstream.to(out.device, out.dtype)
    grads = torch.autograd.grad(out, tensors, upstream, materialize_grads=True)  # without levels some are not used
    return [x.detach().cpu() for x in (out, *grads)]


SHAPES = [(6, 4), (3, 2)]
SIZES = [
    *({"d": d, "h": h} for d in (1, 3, 4, 8, 16, 30, 32, 33, 48, 64, 71, 128, 1025) for h in (1, 2, 8)),
    *({"d": 32, "k": k} for k in (0, 1, 2, 3, 4, 5, 8, 9, 17)),
    *({"d": 32, "shapes": [(2, 3)] * levels} for levels in (0, 1, 3, 5, 32, 33, 40)),
    *({"d": 32, name: 0} for name in ("n", "q", "h", "d")),
    *({"d": 32, "n": n, "q": q} for n in (1, 2, 65, 257) for q in (1, 31, 257)),
    {"d": 32, "shapes": [(0, 3), (2, 2)]},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_operator_equals_the_definition(sizes, dtype):
    value, shapes, loc, weights = make_inputs(**{"shapes": SHAPES, **sizes})
    exact = forward_and_gradients(
        lambda v, x, w: ms_deform_attn(v, shapes, x, w, "torch"), [x.requires_grad_() for x in (value, loc, weights)]
    )
    ours = forward_and_gradients(
        lambda v, x, w: ms_deform_attn(v, shapes, x, w, "cuda"), there(*(x.to(dtype) for x in (value, loc, weights)))
    )
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(
            a.double(), b, atol=tolerance * max(1, b.abs().max().item() if b.numel() else 1), rtol=0
        )


# (value, offsets and logits): what a model in float32 and one under autocast call, their reference is float32.
FUSED_TYPES = [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32),
]  # fmt: skip


def off_the_jumps(shapes, reference, offsets):
    """The offsets, moved by steps of a fiftieth where their type has brought a point to where the gradient jumps."""
    sizes = torch.tensor([(b, a) for a, b in shapes], dtype=torch.float64).view(len(shapes), 1, 2)
    around = reference.double()[:, :, None, :, None]
    step = 1 / sizes if reference.shape[-1] == 2 else around[..., 2:] * 0.5 / max(1, offsets.shape[-2])
    result = offsets.clone()
    for n in range(1, 200):
        cells = (around[..., :2] + result.double() * step) * sizes - 0.5
        near = (cells - cells.round()).abs() < 1e-3
        if not near.any():
            return result
        result = torch.where(near, (offsets.double() + 0.02 * n).to(offsets.dtype), result)
    raise AssertionError("a point stays where the gradient jumps")


def assert_equals_the_definition(tensors, shapes, dtype):
    """Output and gradients of the fused kernel for (value, reference, offsets, logits), against float64 by PyTorch."""
    exact = forward_and_gradients(
        lambda v, r, o, x: ms_deform_attn_fused(v, shapes, r, o, x, "torch"),
        [x.double().requires_grad_() for x in tensors],
        dtype,
    )
    ours = forward_and_gradients(
        lambda v, r, o, x: ms_deform_attn_fused(v, shapes, r, o, x, "cuda"), there(*tensors), dtype
    )
    for a, b, like in zip(ours, exact, (tensors[0], *tensors), strict=True):
        assert a.dtype == like.dtype
        # Sums in float32 or wider, and one rounding to the type of the result.
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5 + torch.finfo(a.dtype).eps
        scale = max(1, b.abs().max().item() if b.numel() else 1)
        torch.testing.assert_close(a.double(), b, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"k": 0}, {"q": 0}, {"shapes": []}, {"k": 5, "h": 3}, {"q": 300, "n": 3}, {"k": 20}, {"d": 33}],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "point_dtype"), FUSED_TYPES, ids=str)
def test_fused_form_equals_the_definition(dims, sizes, dtype, point_dtype):
    value, shapes, reference, offsets, logits = make_fused_inputs(dims, **{"d": 32, **sizes})
    wide = torch.promote_types(dtype, torch.float32)
    value, reference, logits = value.to(dtype), reference.to(wide), logits.to(point_dtype)
    offsets = off_the_jumps(shapes, reference, offsets.to(point_dtype)) if shapes else offsets.to(point_dtype)
    assert_equals_the_definition((value, reference, offsets, logits), shapes, dtype)


SHIFTED = """
import sys, torch
from dn_detr_d2.layers import ms_deform_attn, ms_deform_attn_fused
from dn_detr_d2.inference import accelerate
from dn_detr_d2.layers.position_encoding import encode_boxes

def shifted(x):
    late = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    assert late.is_contiguous() and late.storage_offset() == 1
    return late.copy_(x)

form, which, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
torch.manual_seed(0)
shapes, wide = [(6, 4), (3, 2)], torch.promote_types(dtype, torch.float32)
inputs = [torch.randn(2, 30, 8, 32), torch.rand(2, 5, 8, 2, 4, 2), torch.rand(2, 5, 8, 2, 4)]
if form == "fused":
    inputs.insert(1, torch.rand(2, 5, 2, 4))
inputs = [x.cuda().to(wide if form == "fused" and i == 1 else dtype) for i, x in enumerate(inputs)]
upstream = torch.randn(2, 5, 256).cuda().to(dtype)
function = ms_deform_attn if form == "plain" else ms_deform_attn_fused

def run(inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(leaves[0], shapes, *leaves[1:], "cuda")
    return [out, *torch.autograd.grad(out, leaves, upstream)]

expected = run(inputs, upstream)
moved = [shifted(x) if i == which else x for i, x in enumerate([*inputs, upstream])]
for a, b in zip(run(moved[:-1], moved[-1]), expected, strict=True):
    torch.testing.assert_close(a, b, atol=2 * torch.finfo(a.dtype).eps * b.abs().max().item() + 1e-5, rtol=0)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("form", "which"), [*(("plain", i) for i in range(4)), *(("fused", i) for i in range(5))], ids=str
)
def test_a_tensor_may_start_at_any_element_of_its_storage(form, which, dtype):
    """In a process of its own each: a misaligned load ends the CUDA context, and all later tests with it."""
    command = [sys.executable, "-c", SHIFTED, form, str(which), dtype]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("point_dtype", [torch.float32, None])
def test_sixteen_bits_equal_the_cpu_kernel(dtype, point_dtype):
    """Both sum in float32 and round once, so that they differ by a rounding of the output at most."""
    value, shapes, loc, weights = make_inputs(2, 37, 8, 32, 4, SHAPES, dtype, point_dtype)
    run = [lambda v, x, w, b=b: ms_deform_attn(v, shapes, x, w, b) for b in ("cpu", "cuda")]
    here = forward_and_gradients(run[0], [x.requires_grad_() for x in (value, loc, weights)])
    for a, b in zip(forward_and_gradients(run[1], there(value, loc, weights)), here, strict=True):
        assert a.dtype == b.dtype
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, atol=2 * torch.finfo(dtype).eps * scale, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_locations_that_are_not_finite_are_alike(bad):
    value, shapes, loc, weights = make_inputs(1, 3, 2, 32, 2, SHAPES, torch.float32)
    loc[0, 1, 0, 1, 1, 0] = bad
    here, there_ = (
        forward_and_gradients(lambda v, x, w, b=b: ms_deform_attn(v, shapes, x, w, b), tensors)
        for b, tensors in (
            ("cpu", [x.requires_grad_() for x in (value, loc, weights)]),
            ("cuda", there(value, loc, weights)),
        )
    )
    for a, b in zip(there_, here, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("sizes", [{}, {"n": 2, "k": 3, "d": 32}, {"q": 0}, {"d": 33}], ids=str)
def test_opcheck(sizes):
    value, shapes, loc, weights = make_inputs(**sizes, dtype=torch.float32)
    flat = [x for shape in shapes for x in shape]
    value, loc, weights = there(value, loc, weights)
    torch.library.opcheck(torch.ops.dn_detr_d2.ms_deform_attn.default, (value, flat, loc, weights))


@pytest.fixture
def deterministic():
    """Deterministic algorithms during a test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SORTED_SIZES = [
    {},
    {"d": 32, "h": 8, "q": 257, "n": 3, "k": 4},
    {"d": 32, "h": 8, "n": 2, "k": 4, "q": 30, "shapes": [(6, 4), (3, 2)]},  # queries in tiles
    *({"d": d, "q": 40} for d in (1, 16, 33, 64, 128)),
    {"d": 32, "shapes": [(2, 3)] * 33},
    {"d": 32, "shapes": [(0, 3), (2, 2), (1, 1)]},
    *({"d": 32, name: 0} for name in ("n", "q", "h", "d", "k")),
]


@pytest.mark.parametrize("sizes", SORTED_SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "point_dtype"), FUSED_TYPES, ids=str)
def test_deterministic_gradients_equal_the_definition(deterministic, sizes, dtype, point_dtype):
    value, shapes, reference, offsets, logits = make_fused_inputs(4, **sizes)
    wide = torch.promote_types(dtype, torch.float32)
    value, reference, logits = value.to(dtype), reference.to(wide), logits.to(point_dtype)
    offsets = off_the_jumps(shapes, reference, offsets.to(point_dtype))
    assert_equals_the_definition((value, reference, offsets, logits), shapes, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_deterministic_gradients_are_the_same_bits_each_time(deterministic, form, dtype):
    """Many queries on few cells: there atomic additions give other bits nearly every time, in the value and reference."""
    value, shapes, *rest = (make_inputs if form == "plain" else make_fused_inputs)(
        n=2, q=3000, h=8, d=32, k=4, shapes=[(5, 7), (3, 3), (2, 2), (1, 1)]
    )
    function = ms_deform_attn if form == "plain" else ms_deform_attn_fused
    tensors = [x.to(dtype if i != 1 or form == "plain" else torch.float32) for i, x in enumerate((value, *rest))]
    results = []
    for _ in range(5):
        results.append(forward_and_gradients(lambda v, *x: function(v, shapes, *x, "cuda"), there(*tensors)))
        torch.randn(4096, 4096, device="cuda").sin_()  # other work beside it, other memory
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_deterministic_gradients_of_locations_that_are_not_finite(deterministic):
    value, shapes, loc, weights = make_inputs(1, 3, 2, 32, 2, SHAPES, torch.float32)
    loc[0, 1, 0, 1, 1, 0] = float("nan")
    here, on_cuda = (
        forward_and_gradients(lambda v, x, w, b=b: ms_deform_attn(v, shapes, x, w, b), tensors)
        for b, tensors in (
            ("cpu", [x.requires_grad_() for x in (value, loc, weights)]),
            ("cuda", there(value, loc, weights)),
        )
    )
    for a, b in zip(on_cuda, here, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_deterministic_training_is_the_same_bits_each_time(deterministic, toy_model, system, amp):
    start = toy_model(system).train()
    ends = []
    for _ in range(2):
        torch.manual_seed(1)
        model = copy.deepcopy(start).cuda()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for step in range(3):
            optimizer.zero_grad()
            with EventStorage(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
                losses = model(make_batch(3, 1, seed=step))
            sum(losses.values()).backward()
            optimizer.step()
        ends.append([x.detach().cpu() for x in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], start.parameters(), strict=True))


def test_a_cuda_graph_can_record_a_call():
    value, shapes, loc, weights = make_inputs(1, 9, 2, 32, 4, SHAPES, torch.float32)
    value, loc, weights = value.cuda(), loc.cuda(), weights.cuda()
    expected = ms_deform_attn(value, shapes, loc, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ms_deform_attn(value, shapes, loc, weights)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


def test_more_than_two_to_the_31_elements():
    """The last image of a value of 2^31 + elements is read and its gradient written where it belongs."""
    n, s, h, d = 257, 64 * 128, 8, 128
    value = torch.zeros(n, s, h, d, dtype=torch.bfloat16, device="cuda")
    assert value.numel() > 2**31
    value[-1] = 1
    value.requires_grad_()
    loc = torch.full((n, 1, h, 1, 1, 2), 0.5, device="cuda")
    out = ms_deform_attn(value, [(64, 128)], loc, torch.ones(n, 1, h, 1, 1, device="cuda"))
    assert out[:-1].abs().max() == 0
    assert (out[-1] == 1).all()
    out[-1].sum().backward()
    assert value.grad[-1].sum().item() == h * d
    assert not value.grad[:-1].any()


def test_encodings_of_boxes_do_not_wait_for_the_device():
    """They are made in each decoder layer; raising a Python number to a tensor of the GPU uploads it and waits."""
    boxes = torch.rand(2, 300, 4, device="cuda")
    encode_boxes(boxes, 128)  # compiled and cached once
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoded = encode_boxes(boxes, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(encoded.cpu(), encode_boxes(boxes.cpu(), 128), rtol=0, atol=2e-4)


def test_a_copy_to_the_host_does_not_wait_for_later_work():
    """The copy is there long before the products that were launched after it; both are what they should be."""
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(2):  # the first call of a product is slow
        copy, later = HostCopy(big[:2, :3].clone()), torch.cuda.Event()
        for _ in range(50):
            product = big @ big
        later.record()
        host = copy.wait()
        waited_for_all = later.query()
        torch.cuda.synchronize()
    assert not waited_for_all
    assert host.device.type == "cpu"
    torch.testing.assert_close(host, big[:2, :3].cpu(), rtol=0, atol=0)
    assert product.isfinite().all()


@pytest.mark.parametrize("system", SYSTEMS)
def test_evaluation_equals_the_cpu(toy_model, system):
    model = toy_model(system).eval()
    batch = make_batch(0, 0)
    with torch.no_grad():
        here, there = model(batch), copy.deepcopy(model).cuda()(batch)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b["instances"].scores.cpu(), a["instances"].scores, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_training_step(toy_model, tmp_path, system, counts, dtype):
    model = toy_model(system).cuda()
    step = TrainStep(
        model, iter([make_batch(*counts)]), torch.optim.SGD(model.parameters(), 1e-3), dtype, str(tmp_path)
    )
    step.iter = 0
    with EventStorage() as storage:
        step.run_step()
        step.settle()
        assert storage.latest()["total_loss"][0] > 0


def recorded(toy_cfg, model, graphs, *options):
    """The model with CUDA graphs; a machine without a GPU would refuse the config, not the model."""
    accelerate(model, toy_cfg("dn_detr", "MODEL.DEVICE", "cuda", "TEST.CUDA_GRAPHS", graphs, *options))
    return model


@pytest.mark.parametrize("amp", ["", "bf16", "fp16"])
@pytest.mark.parametrize("system", [*SYSTEMS, *MASK_SYSTEMS])
def test_cuda_graphs_detect_the_same(toy_cfg, toy_model, system, amp):
    """Recorded once a shape and replayed for other images; what was found before stays. Of three graphs two are kept."""
    model = toy_model(system, "TEST.AMP", amp).cuda().eval()
    batches = [
        make_batch(0, 0, sizes=(size,), seed=seed) for seed in range(2) for size in ((64, 96), (70, 90), (96, 64))
    ]
    with torch.no_grad():
        expected = [image for batch in batches for image in model(batch)]
        recorded(toy_cfg, model, 2)
        found = [image for batch in batches for image in model(batch)]
    assert len(model.tensor_pass) == 2
    tolerance = 1e-4 if not amp else 0.05
    for ours, theirs in zip(found, expected, strict=True):
        if "instances" not in ours:
            assert (ours["sem_seg"] - theirs["sem_seg"]).abs().max() < tolerance
            continue
        assert (ours["instances"].scores - theirs["instances"].scores).abs().max() < tolerance
        assert ours["instances"].scores.dtype == torch.float32


def test_a_replay_does_not_wait_and_sees_weights_that_change(toy_cfg, toy_model):
    """A graph reads parameters where they are: a training that updates them in place needs no other recording."""
    model = toy_model("dn_deformable_detr", "TEST.AMP", "bf16").cuda().eval()
    images, sizes = torch.rand(2, 3, 64, 96, device="cuda") * 255, torch.tensor([[64, 96], [50, 70]], device="cuda")
    run = recorded(toy_cfg, model, 1).tensor_pass
    run(images, sizes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = run(images, sizes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    after = run(images, sizes)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = model.forward_tensors(images, sizes)
    torch.testing.assert_close(after[0].float(), expected[0].float(), atol=0.05, rtol=0.05)
    assert not torch.equal(after[0], before[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_record_and_run_the_operator_while_the_first_is_current(toy_cfg, toy_model):
    """A recording on another GPU than that of the first one in the process."""
    for i in (0, 1):
        model = toy_model("dn_deformable_detr").to(f"cuda:{i}").eval()
        images, sizes = (
            torch.rand(2, 3, 64, 96, device=f"cuda:{i}") * 255,
            torch.tensor([[64, 96], [50, 70]]).to(f"cuda:{i}"),
        )
        with torch.no_grad():
            expected = model.forward_tensors(images, sizes)
        run = recorded(toy_cfg, model, 1).tensor_pass
        for _ in range(2):
            torch.testing.assert_close(run(images, sizes)[0], expected[0], atol=1e-4, rtol=1e-4)
        images.mul_(0.5)
        assert not torch.equal(run(images, sizes)[0], expected[0])
        value, shapes, loc, weights = make_inputs(dtype=torch.float32)
        leaves = [x.detach().to(f"cuda:{i}").requires_grad_() for x in (value, loc, weights)]
        out = ms_deform_attn(leaves[0], shapes, *leaves[1:], "cuda")
        torch.testing.assert_close(out.cpu(), ms_deform_attn(value, shapes, loc, weights, "torch"))
        assert all(x.device == out.device for x in torch.autograd.grad(out.sum(), leaves))


def test_padding_of_a_recording_is_an_input(toy_cfg, toy_model):
    """One graph for images of other sizes in the same padded batch."""
    model = toy_model("dn_detr", "TEST.HIDE_PADDING", True).cuda().eval()
    run = recorded(toy_cfg, model, 4).tensor_pass
    images = torch.rand(2, 3, 64, 96, device="cuda") * 255
    for sizes in ([[64, 96], [50, 70]], [[33, 57], [64, 96]]):
        sizes = torch.tensor(sizes, device="cuda")
        with torch.no_grad():
            expected = model.forward_tensors(images, sizes)
        for ours, theirs in zip(run(images, sizes), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert len(run) == 1


def test_the_fallback_of_the_operator_can_be_recorded(toy_cfg, toy_model):
    """Its table of sizes must not come from host memory, which is another one at the replay."""
    model = toy_model("dn_deformable_detr", "MODEL.DN_DETR.OP_BACKEND", "torch").cuda().eval()
    run = recorded(toy_cfg, model, 1).tensor_pass
    images, sizes = torch.rand(1, 3, 64, 96, device="cuda") * 255, torch.tensor([[64, 96]], device="cuda")
    with torch.no_grad():
        expected = model.forward_tensors(images, sizes)
    run(images, sizes)
    rubbish = [torch.full((4, 2), 9).pin_memory() for _ in range(64)]  # what the allocator would give next
    for ours, theirs in zip(run(images, sizes), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    del rubbish


def test_threads_and_streams_share_recordings(toy_cfg, toy_model):
    model = toy_model("dn_detr").cuda().eval()
    run = recorded(toy_cfg, model, 2).tensor_pass
    shapes = [(1, 3, 64, 96), (1, 3, 96, 64), (1, 3, 80, 80)]
    given = [torch.rand(*shapes[i % 3], device="cuda") * 255 for i in range(24)]
    sizes = [torch.tensor([x.shape[-2:]], device="cuda") for x in given]
    with torch.no_grad():
        expected = [model.forward_tensors(*pair) for pair in zip(given, sizes, strict=True)]
    torch.cuda.synchronize()

    def on_its_own_stream(pair):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = run(*pair)
        stream.synchronize()
        return found

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(on_its_own_stream, zip(given, sizes, strict=True)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-3)

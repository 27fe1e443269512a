"""Token pruning: recorded numbers, removal against masks, cost, gradients, weights of other networks."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.token_pruning import (
    PrunedViT,
    PrunedViTConfig,
    TokenPredictor,
    gumbel_keep,
    gumbel_noise,
    ideal_macs,
    keep_counts,
    masked_softmax,
)

FOLDER = Path(__file__).parents[1] / "golden"
ARRAYS = np.load(FOLDER / "sureid.npz")
TABLES = json.loads((FOLDER / "sureid.json").read_text())
RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

TINY = PrunedViTConfig(
    backbone="vit_tiny_patch16_224", image_size=(64, 32), patch_size=8, width=32, heads=2, depth=6, stages=(1, 3, 4),
    keep_ratio=0.7, num_classes=5,
)  # fmt: skip


def golden(group, name, dtype=torch.float64):
    found = torch.from_numpy(ARRAYS[f"{group}/{name}"])
    return found.to(dtype) if found.is_floating_point() else found


def network(seed=0, sharp=False, **changes):
    torch.manual_seed(seed)
    net = PrunedViT(replace(TINY, **changes)).double().eval()
    if sharp:
        sharpen(net)
    return net


@torch.no_grad()
def sharpen(net):
    """Predictors that really choose: at their small initial weights every score is nearly the same."""
    for predictor in net.predictors:
        for parameter in predictor.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)


def images(count=3, seed=1, dtype=torch.float64):
    return torch.randn(count, 3, 64, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- Attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["exact", "eps"])
@pytest.mark.parametrize(("dtype", "tolerance", "slope"), [(torch.float64, 1e-12, 1e-9), (torch.float32, 2e-6, 2e-4)])
def test_masked_softmax_is_the_recorded_one(form, dtype, tolerance, slope):
    eps = {"exact": 0.0, "eps": 1e-6}[form]
    scores, value, weight = (golden("masked_softmax", n, dtype) for n in ("scores", "v", "weight"))
    policy = golden("masked_softmax", "policy", dtype).clone().requires_grad_()
    attention = masked_softmax(scores, policy, eps)
    torch.testing.assert_close(attention.double(), golden("masked_softmax", f"attn_{form}"), rtol=0, atol=tolerance)
    out = attention @ value
    torch.testing.assert_close(out.double(), golden("masked_softmax", f"out_{form}"), rtol=0, atol=10 * tolerance)
    (out * weight).sum().backward()
    expected = golden("masked_softmax", f"grad_policy_{form}")
    torch.testing.assert_close(policy.grad.double(), expected, rtol=slope, atol=slope)


def test_a_dominating_dropped_key_leaves_the_exact_form_alone():
    scores, policy = golden("masked_softmax", "hard_scores"), golden("masked_softmax", "hard_policy")
    for form, eps in (("exact", 0.0), ("eps", 1e-6)):
        expected = golden("masked_softmax", f"hard_attn_{form}")
        torch.testing.assert_close(masked_softmax(scores, policy, eps), expected, rtol=0, atol=1e-12)
    policy.requires_grad_()
    masked_softmax(1e4 * scores, policy, 0.0)[..., 0].sum().backward()
    assert policy.grad.isfinite().all()


def test_masked_softmax_equals_the_loops():
    g = torch.Generator().manual_seed(0)
    scores, policy = torch.randn(2, 2, 5, 5, generator=g).double(), torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1.0]])
    found = masked_softmax(scores, policy.double(), 0.0)
    for b, h, i in np.ndindex(2, 2, 5):
        weights = [math.exp(scores[b, h, i, j]) * (1.0 if i == j else policy[b, j].item()) for j in range(5)]
        assert found[b, h, i].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-12)
    torch.testing.assert_close(masked_softmax(scores[:, :, :1], policy.double(), 0.0), found[:, :, :1])


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_masked_softmax_gradcheck(eps):
    scores = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    policy = torch.tensor([[1.0, 0.3, 0.9, 0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, p: masked_softmax(s, p, eps), (scores, policy))


def test_masked_softmax_in_half_precision_and_with_wrong_shapes():
    scores = torch.full((1, 1, 2, 2), 6e4, dtype=torch.float16)
    assert masked_softmax(scores, torch.ones(1, 2)).tolist() == [[[[0.5, 0.5], [0.5, 0.5]]]]
    with pytest.raises(ValueError, match="a policy"):
        masked_softmax(scores, torch.ones(1, 3))
    for wrong in (torch.ones(2), torch.tensor(1.0), torch.ones(1, 1, 0, 0), torch.ones(1, 1, 3, 2)):
        with pytest.raises(ValueError, match="a policy"):
            masked_softmax(wrong, torch.ones(1, 2))
    for eps in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="at least 0"):
            masked_softmax(scores, torch.ones(1, 2), eps)


# --- Decisions ------------------------------------------------------------------------------------------------------


def recorded_predictor(dtype):
    predictor = TokenPredictor(16).to(dtype)
    names = {"norm": "ln_w ln_b", "input": "w0 b0", "output.0": "w1 b1", "output.2": "w2 b2", "output.4": "w3 b3"}
    state = {}
    for layer, pair in names.items():
        weight, bias = pair.split()
        state |= {f"{layer}.weight": golden("predictor", weight), f"{layer}.bias": golden("predictor", bias)}
    predictor.load_state_dict(state)
    return predictor


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_predictor_and_decisions_are_the_recorded_ones(dtype, tolerance):
    predictor, policy = recorded_predictor(dtype), golden("predictor", "policy", dtype)[:, :, 0]
    log_probs = predictor(golden("predictor", "x", dtype), policy)
    expected = golden("predictor", "log_probs")
    torch.testing.assert_close(log_probs.double(), expected, rtol=tolerance, atol=tolerance)
    log_probs = expected.to(dtype).clone().requires_grad_()
    hard = gumbel_keep(log_probs, golden("predictor", "gumbel_noise", dtype))
    torch.testing.assert_close(hard.double(), golden("predictor", "hard_keep"), rtol=0, atol=0)
    decision = hard * policy
    torch.testing.assert_close(decision.double(), golden("predictor", "decision"), rtol=0, atol=0)
    (decision * golden("predictor", "upstream_grad_decision", dtype)).sum().backward()
    torch.testing.assert_close(log_probs.grad.double(), golden("predictor", "grad_log_probs"), rtol=0, atol=tolerance)


def test_a_predictor_without_kept_tokens_and_of_all_of_them():
    predictor, x = recorded_predictor(torch.float64), golden("predictor", "x")
    assert predictor(x, torch.zeros(x.shape[:2])).isfinite().all()
    torch.testing.assert_close(predictor(x), predictor(x, torch.ones(x.shape[:2])))
    plain = TokenPredictor(16, "mlp").double()
    kept = torch.ones(x.shape[:2])
    kept[:, 3] = 0
    changed = plain(x, kept) != plain(x)
    assert changed.any(2)[:, 3].all() and not changed.any(2)[:, :3].any()  # eq. 1: only the masked token's own input
    for wrong in ({"width": 10}, {"width": 0}, {"width": 8, "kind": "cnn"}):
        with pytest.raises(ValueError, match="token predictor"):
            TokenPredictor(**wrong)


def test_gumbel_noise_is_gumbel_and_finite_at_both_ends():
    assert gumbel_noise(torch.tensor([0.0, 1 - 2**-24, 1.0])).isfinite().all()
    sample = gumbel_noise(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert sample.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert sample.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    probability = torch.tensor([0.2, 0.8]).log().expand(50_000, 1, 2)
    kept = gumbel_keep(probability, gumbel_noise(torch.rand(50_000, 1, 2, generator=torch.Generator().manual_seed(1))))
    assert kept.mean().item() == pytest.approx(0.8, abs=0.01)  # the expectation of the decision is π


@pytest.mark.parametrize("key", TABLES["keep_schedule"])
def test_counts_are_the_recorded_ones(key):
    tokens, ratio = key.split(":")
    for rounding in ("floor", "round", "ceil"):
        found = list(keep_counts(int(tokens), float(ratio), rounding))
        assert found == TABLES["keep_schedule"][key][rounding]


@pytest.mark.parametrize("ratio", [0, 1.2, -0.5, float("nan")])
def test_a_keep_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        keep_counts(128, ratio)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        replace(TINY, keep_ratio=ratio)


# --- The network ----------------------------------------------------------------------------------------------------


def removed(net, x, camera=None, tolerance=1e-13):
    """Removal, found equal to masks: class tokens, places of what is left, masks."""
    (gathered, places), (masked, masks) = net.gathered(x, camera), net.masked(x, camera)
    torch.testing.assert_close(gathered, masked, rtol=0, atol=tolerance)
    return gathered, places, masks


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("order", ["position", "score"])
def test_removal_equals_masks(ratio, order):
    net, x = network(sharp=True, keep_ratio=ratio, token_order=order), images()
    with torch.no_grad():
        _, places, masks = removed(net, x)
        for stage, place in enumerate(places):
            assert place.shape[1] == net.counts[stage] == keep_counts(32, ratio)[stage]
            expected = torch.zeros(3, 32, dtype=torch.float64).scatter(1, place, 1.0)
            assert torch.equal(expected, masks[:, stage])
        single, _, _ = removed(net.float(), x.float(), tolerance=1e-5)
        torch.testing.assert_close(net(x.float()), single)


def test_removal_equals_masks_in_single_precision_at_full_size():
    torch.manual_seed(0)
    net = PrunedViT(PrunedViTConfig()).eval()
    sharpen(net)
    x = torch.randn(2, 3, 256, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        removed(net, x, tolerance=1e-5)


def test_without_pruning_it_is_the_network_of_timm():
    net, x = network(pruning=False), images()
    with torch.no_grad():
        assert torch.equal(net(x), net.backbone.forward_features(x)[:, 0])
        whole = network(keep_ratio=1.0)
        whole.backbone.load_state_dict(net.backbone.state_dict())
        torch.testing.assert_close(whole.gathered(x)[0], net.backbone.forward_features(x)[:, 0], rtol=0, atol=1e-13)
        torch.testing.assert_close(whole.masked(x)[0], net.backbone.forward_features(x)[:, 0], rtol=0, atol=1e-13)


def noise(count=3, seed=2):
    return gumbel_noise(torch.rand(count, 3, 32, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_training_masks_shrink_and_decide_by_the_noise():
    net = network()
    out = net.train().trained(images(), noise())
    masks = out.masks_BSN.detach()
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks[:, 1] <= masks[:, 0]).all() and (masks[:, 2] <= masks[:, 1]).all()
    again = network().train().trained(images(), noise())
    assert torch.equal(again.masks_BSN, out.masks_BSN)
    other = network().train().trained(images(), noise(seed=3))
    assert not torch.equal(other.masks_BSN.detach(), masks)


def test_every_loss_reaches_the_predictors():
    net = network().train()
    out = net.trained(images(), noise())
    torch.nn.functional.cross_entropy(
        net.classifier(net.after_neck(out.feature_BD)), torch.tensor([0, 1, 2])
    ).backward()
    for predictor in net.predictors:
        assert predictor.output[4].weight.grad.abs().sum() > 0
    assert net.neck.bias.grad is None and net.neck.weight.grad is not None


def test_every_parameter_that_trains_gets_a_gradient():
    for changes in ({}, {"reweight": "pool"}, {"reweight": "pre_last", "stages": (1, 2, 3)}, {"pruning": False},
                    {"neck": False}, {"predictor": "mlp"}, {"reweight": "off"}):  # fmt: skip
        net = network(**changes).train()
        out = net.trained(images(), noise())
        (net.classifier(net.after_neck(out.feature_BD)).square().sum() + out.feature_BD.square().sum()).backward()
        lacking = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert lacking == [], changes


def naive_reweighted(net, x, form):
    """Eq. 7 and 8 in plain steps, without pruning decisions in between (everything kept)."""
    tokens = net._tokens(x)
    before = None
    for number, block in enumerate(net.backbone.blocks):
        if form == "pre_last" and number == len(net.backbone.blocks) - 1:
            tokens = mixed(net, tokens, *before, form)
        before = block, tokens
        tokens = block(tokens)
    if form in ("post", "pool"):
        tokens = mixed(net, tokens, *before, form)
    return net.backbone.norm(tokens[:, 0])


def mixed(net, tokens, block, x, form):
    batch, count, width = x.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(x)).reshape(batch, count, 3, heads, width // heads)
    a = torch.zeros(batch, count, dtype=x.dtype)
    for b in range(batch):
        for h in range(heads):
            score = torch.stack([qkv[b, 0, 0, h] @ qkv[b, j, 1, h] for j in range(count)]) / math.sqrt(width // heads)
            a[b] += score.softmax(0) / heads
    lam, out = net.reweight, tokens.clone()
    if form == "pool":
        out[:, 0] = tokens[:, 0] + lam * (a[:, 1:, None] * tokens[:, 1:]).sum(1)
        return out
    out[:, 0] = (1 + lam) * tokens[:, 0]
    out[:, 1:] = tokens[:, 1:] + lam * a[:, 1:, None] * tokens[:, 1:]
    return out


@pytest.mark.parametrize("form", ["post", "pre_last", "pool"])
def test_reweighting_is_eq_7_and_8(form):
    net, x = network(reweight=form, keep_ratio=1.0, stages=(1, 2, 3), softmax_guard=0.0), images(2)
    everything = torch.tensor([0.0, 50.0], dtype=torch.float64).expand(2, 3, 32, 2)  # noise that keeps all
    with torch.no_grad():
        found, masks = net.trained(x, everything).feature_BD, net.trained(x, everything).masks_BSN
        assert masks.min() == 1
        torch.testing.assert_close(found, naive_reweighted(net, x, form), rtol=0, atol=1e-12)
        plain = network(reweight="off", keep_ratio=1.0, stages=(1, 2, 3))(x).double()
        difference = (net(x).double() - plain).abs().max().item()
        assert difference == 0  # training alone
        again = network(reweight=form, keep_ratio=1.0, stages=(1, 2, 3), reweight_at_inference=True)
        torch.testing.assert_close(again.gathered(x)[0], naive_reweighted(again, x, form), rtol=0, atol=1e-12)
        # The final LayerNorm removes a factor of the class token, up to its eps: the paper's form does not reach it.
        assert ((again.gathered(x)[0] - plain).abs().max().item() < 1e-3) == (form == "post")


def test_the_width_scale_divides_the_scores_by_the_width():
    net, x = network(attention_scale="width", pruning=False), images()
    plain = network(pruning=False)
    with torch.no_grad():
        for block in plain.backbone.blocks:
            block.attn.qkv.weight[:32] *= (32 / 16) ** -0.5  # heads are 16 wide: 1/√32 instead of 1/√16
            block.attn.qkv.bias[:32] *= (32 / 16) ** -0.5
        torch.testing.assert_close(net(x), plain(x))


def test_threshold_inference_keeps_another_number_for_every_image():
    net, x = network(sharp=True, inference="threshold"), images(6)
    with torch.no_grad():
        log_pi = net.predictors[0](net.backbone.blocks[0](net._tokens(x))[:, 1:])
        net.predictors[0].output[4].bias[0] += (log_pi[..., 1] - log_pi[..., 0]).median()  # half are above
        feature, masks = net.masked(x)
        torch.testing.assert_close(net(x), feature)
        assert len(set(masks.sum(2).flatten().tolist())) > 1
        log_pi = net.predictors[0](net.backbone.blocks[0](net._tokens(x))[:, 1:])
        assert torch.equal(masks[:, 0], (log_pi[:, :, 1] > log_pi[:, :, 0]).double())


@pytest.mark.parametrize("ratio", [0.5, 0.8])
@pytest.mark.parametrize("selection", ["attention", "random"])
def test_other_choices_of_tokens_are_controls(selection, ratio):
    net, x = network(sharp=True, selection=selection, keep_ratio=ratio), images()
    with torch.no_grad():
        _, places, _ = removed(net, x)
        if selection == "random":  # the same positions of every image, other ones with another seed
            assert all((place == place[:1]).all() for place in places)
            other = network(selection="random", selection_seed=1, keep_ratio=ratio).gathered(x)[1]
            assert not torch.equal(other[0], places[0])
            return
        tokens, left = net._tokens(x), torch.arange(32).expand(3, -1)
        for number, block in enumerate(net.backbone.blocks[:4]):  # stages are before blocks 1, 3 and 4
            query, key, _ = block.attn.heads(block.norm1(tokens))
            weight = (query @ key.transpose(2, 3) / 16**0.5).softmax(dim=3).mean(dim=1)
            tokens = block(tokens)
            if number + 1 in (1, 3, 4):
                stage = (1, 3, 4).index(number + 1)
                chosen = weight[:, 0, 1:].topk(net.counts[stage], dim=1).indices.sort(dim=1).values
                left = left.gather(1, chosen)
                assert torch.equal(places[stage], left)
                rows = torch.cat([torch.zeros(3, 1, dtype=torch.int64), chosen + 1], dim=1)
                tokens = tokens.gather(1, rows[:, :, None].expand(-1, -1, 32))
        # Training is the predictor's whatever is chosen by later.
        one, two = (network(selection=s).train().trained(x, noise()).masks_BSN for s in (selection, "predictor"))
        assert torch.equal(one, two)


def test_overlapping_patches_are_windows_of_the_image():
    net, x = network(patch_stride=6, sharp=True), images()
    assert net.backbone.patch_embed.grid_size == (10, 5)  # (64 - 8) // 6 + 1, (32 - 8) // 6 + 1
    assert net.num_tokens == 50
    tokens = net.backbone.patch_embed(x)
    kernel, bias = net.backbone.patch_embed.proj.weight, net.backbone.patch_embed.proj.bias
    for row, column in ((0, 0), (3, 4), (9, 2)):
        window = x[:, :, 6 * row : 6 * row + 8, 6 * column : 6 * column + 8]
        expected = (window[:, None] * kernel).sum(dim=(2, 3, 4)) + bias
        torch.testing.assert_close(tokens[:, 5 * row + column], expected)
    with torch.no_grad():
        removed(net, x)
    # TransReID's sliding window at full size.
    with torch.device("meta"):
        whole = PrunedViT(PrunedViTConfig(patch_stride=12))
    assert whole.backbone.patch_embed.grid_size == (21, 10) and whole.backbone.pos_embed.shape[1] == 211
    side_by_side = network(patch_stride=8)
    side_by_side.load_state_dict(network().state_dict())
    with torch.no_grad():
        assert torch.equal(side_by_side(x), network()(x))


def test_a_camera_is_a_vector_on_every_token():
    net, x = network(cameras=3, camera_weight=2.0, sharp=True), images()
    camera = torch.tensor([2, 0, 2])
    without = network(sharp=True)
    without.load_state_dict({k: v for k, v in net.state_dict().items() if k != "cameras"})
    with torch.no_grad():
        torch.testing.assert_close(net._tokens(x, camera), without._tokens(x) + 2.0 * net.cameras[camera][:, None])
        torch.testing.assert_close(net._tokens(x), without._tokens(x) + 2.0 * net.cameras.mean(0))
        removed(net, x, camera)
        torch.testing.assert_close(net(x, camera)[1:], net(x[1:], camera[1:]))
        assert not torch.allclose(net(x, camera), net(x))
    net.train().trained(x, noise(), camera_B=camera).feature_BD.square().sum().backward()
    assert (net.cameras.grad[[0, 2]] != 0).any(dim=1).all() and (net.cameras.grad[1] == 0).all()
    plain = network(cameras=3, pruning=False)
    plain.trained(x, camera_B=camera).feature_BD.square().sum().backward()
    assert plain.cameras.grad.abs().sum() > 0


def test_dynamicvit_weights_keep_by_the_other_column():
    net, x = network(sharp=True), images()
    swapped = network(keep_column=0)
    state = net.state_dict()
    for key in state:
        if key.endswith(("output.4.weight", "output.4.bias")):
            state[key] = state[key].flip(0)
    swapped.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(net(x), swapped(x))


def test_neck_and_embedding():
    net, x = network(embed_after_neck=True), images()
    with torch.no_grad():
        net.neck.running_mean.fill_(1.0)
        torch.testing.assert_close(net(x), net.neck(net.gathered(x)[0]))
    assert not net.neck.bias.requires_grad


@pytest.mark.parametrize("key", ["deit_s", "vit_b", "deit_s_224", "vit_b_224"])
def test_ideal_cost_is_the_recorded_table(key):
    tokens, width = (196 if "224" in key else 128), (384 if "deit" in key else 768)
    table = TABLES["flops"][key]
    assert ideal_macs(tokens, width, 12, 768) == round(table["base_gmacs"] * 1e9)
    for row in table["rows"]:
        counts = keep_counts(tokens, row["p"])
        assert list(counts) == row["keep"]
        macs = ideal_macs(tokens, width, 12, 768, (3, 6, 9), counts)
        assert macs == round(row["gmacs"] * 1e9)
        without = ideal_macs(tokens, width, 12, 768, (3, 6, 9), counts, predictors=False)
        assert macs - without == round(row["predictor_gmacs"] * 1e9)


@pytest.mark.parametrize("ratio", RATIOS)
def test_deit_small_costs_what_the_table_says_and_has_its_lengths(ratio):
    lengths = []
    with torch.device("meta"):
        net = PrunedViT(PrunedViTConfig(keep_ratio=ratio)).eval()
        for block in net.backbone.blocks:
            block.attn.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, 256, 128))
    row = next(r for r in TABLES["flops"]["deit_s"]["rows"] if r["p"] == ratio)
    assert counter.get_total_flops() // 2 == round(row["gmacs"] * 1e9)
    assert lengths == TABLES["keep_schedule"][f"128:{ratio}"]["sequence_lengths_with_class"]


# --- Configuration and weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": (60, 32)}, "not whole patches"),
        ({"patch_stride": 9}, "patch_stride must be at most the patch of 8×8 pixels, got 9"),
        ({"patch_stride": 6, "image_size": (64, 7)}, "64×7 pixels is smaller than a patch"),
        ({"patch_stride": -1}, "sizes must be positive"),
        ({"inference": "threshold", "selection": "random"}, "needs selection=predictor, got random"),
        ({"camera_weight": -1.0}, "camera_weight must be at least 0"),
        ({"stages": (3, 1, 4)}, "stages must rise"),
        ({"stages": (1, 3, 6)}, "stages must rise"),
        ({"stages": (1, 3, 5), "reweight": "pre_last"}, "stages must rise"),
        ({"backbone": "resnet18"}, "no plain vision transformer"),
        ({"backbone": "vit_tinny_patch16_224"}, "did you mean"),
        ({"softmax_guard": -1.0}, "softmax_guard"),
        ({"rounding": "up"}, "rounding must be one of floor, round, ceil, got 'up'"),
        ({"keep_column": 3}, "keep_column must be one of 1, 0"),
        ({"stages": (2, 4)}, "three blocks"),
        ({"heads": 3}, "divisible"),
        ({"backbone": "vit_small_patch16_18x2_224"}, "no plain vision transformer"),
        ({"backbone": "deit3_small_patch16_224"}, "no plain vision transformer"),
    ],
)
def test_wrong_configurations_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        PrunedViT(replace(TINY, **changes))


def distilled_weights(path):
    """A small DeiT with distillation token and heads, as timm stores it, at 32 × 32 pixels."""
    torch.manual_seed(3)
    net = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2,
                            depth=6, num_classes=7)  # fmt: skip
    torch.save(net.state_dict(), path)
    return net


def test_distilled_weights_fit_the_plain_network(tmp_path):
    source = distilled_weights(tmp_path / "deit.pth")
    config = replace(TINY, backbone="deit_tiny_distilled_patch16_224", pruning=False)
    net = PrunedViT(config, weights=str(tmp_path / "deit.pth"))
    assert torch.equal(net.backbone.pos_embed[:, 0], source.pos_embed[:, 0])
    assert torch.equal(net.backbone.blocks[5].mlp.fc2.weight, source.blocks[5].mlp.fc2.weight)
    grid = source.pos_embed[:, 2:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    for mode, antialias in (("bicubic", True), ("bilinear", False)):
        net = PrunedViT(config, weights=str(tmp_path / "deit.pth"), resize=mode)
        expected = torch.nn.functional.interpolate(grid, size=(8, 4), mode=mode, antialias=antialias)
        torch.testing.assert_close(net.backbone.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))


def test_a_file_says_how_its_network_is_built():
    plain, pruned = network(pruning=False).architecture, network(predictor="mlp", rounding="ceil").architecture
    assert len(plain) == 2 and "predictors" not in " ".join(plain)
    assert "the 23, 16, 11 image tokens" in pruned[2] and "averaged" not in pruned[1]
    other = network(inference="threshold", reweight="pool", reweight_at_inference=True, embed_after_neck=True)
    assert "above 1/2" in other.architecture[2] and "pool" in other.architecture[3]
    assert other.architecture[-1].endswith("then the batch norm neck")


def test_weights_that_do_not_fit_are_named(tmp_path):
    distilled_weights(tmp_path / "deit.pth")
    with pytest.raises(ValueError, match="do not fit"):
        PrunedViT(replace(TINY, width=64), weights=str(tmp_path / "deit.pth"))
    with pytest.raises(ValueError, match="tensors differ"):
        PrunedViT(replace(TINY, depth=8), weights=str(tmp_path / "deit.pth"))
    with pytest.raises(ValueError, match=r"none\.pth cannot be read"):
        PrunedViT(TINY, weights=str(tmp_path / "none.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        PrunedViT(TINY, weights=str(tmp_path / "broken.pth"))
    torch.save({**timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), patch_size=8, embed_dim=32, num_heads=2,
                                    depth=6, num_classes=0).state_dict()}, tmp_path / "oblong.pth")  # fmt: skip
    with pytest.raises(ValueError, match="32 positions are no square"):
        PrunedViT(TINY, weights=str(tmp_path / "oblong.pth"))
    with pytest.raises(ValueError, match="no pretrained weights for another patch_size"):
        PrunedViT(TINY, pretrained=True)

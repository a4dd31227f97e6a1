# SPDX-License-Identifier: GPL-3.0-or-later
"""Replacement of stock layers: weights, aliases, hooks, parameter lists, and a user's own initialisation."""

from __future__ import annotations

import copy

import torch
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import nn

from flashfusemoe_ds import MoE, get_dense_params, replace_moe
from flashfusemoe_ds.ds.fused_experts import FusedExperts
from flashfusemoe_ds.ds.replace import remap_groups, remap_optimizer, replace_moe_and_map
from flashfusemoe_ds.nn.experts import ModuleExperts
from tests.distributed import run_ranks

D = 8


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))


class Model(nn.Module):
    def __init__(self, moe_class: type[nn.Module] = StockMoE, expert: nn.Module | None = None) -> None:
        super().__init__()
        self.inp = nn.Linear(D, D)
        self.moe = moe_class(D, expert or mlp(), num_experts=4, k=2, use_residual=True, drop_tokens=False)
        self.again = self.moe  # one layer under two names
        self.out = nn.Linear(D, 1)

    def forward(self, x):
        x = self.moe(self.inp(x))[0]
        return self.out(self.again(x)[0])


def test_weights_aliases_flags_and_results() -> None:
    torch.manual_seed(0)
    stock = Model()
    stock.moe.eval()
    calls = []
    stock.moe.register_forward_hook(lambda *_: calls.append(1))
    stock.moe.deepspeed_moe.gate.wg.weight.requires_grad_(False)
    expected_state = {k: v.clone() for k, v in stock.state_dict().items()}
    x = torch.randn(5, D)
    torch.manual_seed(1)
    expected = stock(x)

    model = replace_moe(stock)
    assert model is stock and type(model.moe) is MoE and model.again is model.moe
    assert isinstance(model.moe.deepspeed_moe, MOELayer) and isinstance(model.moe.deepspeed_moe.gate, TopKGate)
    assert isinstance(model.moe.deepspeed_moe.experts, FusedExperts)
    assert not any(m.training for m in model.moe.modules()) and model.inp.training
    assert not model.moe.deepspeed_moe.gate.wg.weight.requires_grad
    assert list(model.state_dict()) == list(expected_state)
    assert all(torch.equal(v, expected_state[k]) for k, v in model.state_dict().items())
    torch.manual_seed(1)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-7)
    assert len(calls) == 4
    assert replace_moe(model).moe is model.moe


def test_a_model_that_is_itself_a_layer() -> None:
    assert type(replace_moe(StockMoE(D, mlp(), 4))) is MoE


def test_a_subclass_of_the_users_is_left_alone() -> None:
    class Own(StockMoE):
        pass

    assert type(replace_moe(nn.Sequential(Own(D, mlp(), 4)))[0]) is Own


def test_marks_on_parameters_follow() -> None:
    stock = StockMoE(D, mlp(), 4)
    for expert in stock.deepspeed_moe.experts.deepspeed_experts:
        expert[0].weight.my_mark = "kept"
    experts = replace_moe(stock).deepspeed_moe.experts
    assert experts.up_proj.my_mark == "kept"
    assert all(p.allreduce is False and p.group_name == "ep_size_1" for p in experts.parameters())


def test_parameter_lists_groups_and_optimizer_follow() -> None:
    stock = Model()
    decay = [p for p in stock.parameters() if p.dim() > 1]
    rest = [p for p in stock.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1, "name": "decay"}, {"params": rest, "name": "rest"}]
    optimizer = torch.optim.AdamW(copy.copy([dict(g) for g in groups]))
    plain = list(stock.parameters())
    model, mapping = replace_moe_and_map(stock)

    new = list(model.parameters())
    assert {id(p) for p in remap_groups(plain, mapping)} == {id(p) for p in new}
    remapped = remap_groups(groups, mapping)
    experts = model.moe.deepspeed_moe.experts
    in_decay, in_rest = ({id(p) for p in g["params"]} for g in remapped)
    assert id(experts.up_proj) in in_decay and id(experts.down_proj) in in_decay
    assert id(experts.up_proj_bias) in in_rest, "a stacked bias stays where the biases were"
    assert len(in_decay | in_rest) == len(new) and remapped[0]["weight_decay"] == 0.1
    remap_optimizer(optimizer, mapping)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in remapped]
    model(torch.randn(5, D)).sum().backward()
    before = experts.up_proj.detach().clone()
    optimizer.step()
    assert not torch.equal(experts.up_proj, before)


def test_dense_params_in_backward_order() -> None:
    model = replace_moe(Model())
    dense = get_dense_params(model)
    experts = {id(p) for p in model.moe.deepspeed_moe.experts.parameters()}
    assert not experts & {id(p) for p in dense}
    assert len(dense) + len(experts) == len(list(model.parameters()))
    assert dense[0] is model.out.bias and dense[-1] is model.inp.weight
    assert get_dense_params(model, backward_order=False) == dense[::-1]


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            module.bias.data = torch.full_like(module.bias, 0.5)


def test_a_models_own_initialisation_reaches_the_experts_with_stock_draws() -> None:
    states = []
    for moe_class in (StockMoE, MoE):
        torch.manual_seed(0)
        model = Model(moe_class)
        model.apply(init_weights)
        states.append(model.state_dict())
        assert torch.equal(torch.get_rng_state(), torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    up = "moe.deepspeed_moe.experts.deepspeed_experts.{}.0.weight"
    assert not torch.equal(states[1][up.format(0)], states[1][up.format(1)])


def test_the_constructor_draws_what_stock_draws() -> None:
    states = []
    for moe_class in (StockMoE, MoE):
        torch.manual_seed(0)
        Model(moe_class)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_copies_are_independent() -> None:
    model = Model(MoE)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.moe.deepspeed_moe.experts.up_proj.zero_()
    assert torch.count_nonzero(model.moe.deepspeed_moe.experts.up_proj)


def marks_of_a_copy(rank: int, world: int) -> list[bool]:
    moe = copy.deepcopy(MoE(D, mlp(), 4))
    moe.set_deepspeed_parallelism()
    return [p.allreduce is False and p.group_name == "ep_size_1" for p in moe.deepspeed_moe.experts.parameters()]


def test_a_copied_model_trains_its_experts_as_experts() -> None:
    """copy.deepcopy loses the marks that tell DeepSpeed which parameters are experts'."""
    assert run_ranks(1, marks_of_a_copy) == [[True] * 4]


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        self.last_shape = x.shape
        return self.fc(self.norm(x)), None


def test_other_experts_keep_their_own_parameters_and_get_zero_gradients_without_tokens() -> None:
    model = Model(MoE, Custom())
    experts = model.moe.deepspeed_moe.experts
    assert isinstance(experts, ModuleExperts)
    with torch.no_grad():
        model.moe.deepspeed_moe.gate.wg.weight.zero_()  # equal logits: top-1 always picks expert 0
    model.moe.deepspeed_moe.gate.top2_2nd_expert_sampling = False
    model(torch.randn(6, D)).sum().backward()
    # DeepSpeed's experts see [groups, local experts, rows, D]; equal logits send every token to the first two.
    assert [e.last_shape for e in experts.deepspeed_experts] == [(1, 1, n, D) for n in (6, 6, 0, 0)]
    grads = [[p.grad for p in e.parameters()] for e in experts.deepspeed_experts]
    assert all(g is not None for expert in grads for g in expert)
    assert all(torch.count_nonzero(g) == 0 for g in grads[3]) and any(torch.count_nonzero(g) for g in grads[0])


def test_load_state_dict_reports_missing_wrong_and_unknown_keys() -> None:
    moe = MoE(D, mlp(), 2)
    state = moe.state_dict()
    prefix = "deepspeed_moe.experts.deepspeed_experts."
    state["deepspeed_moe.experts.deepspeed_experts.7.0.weight"] = torch.zeros(1)
    del state[f"{prefix}1.2.bias"]
    result = moe.load_state_dict(state, strict=False)
    assert result.missing_keys == [f"{prefix}1.2.bias"]
    state = moe.state_dict()
    state[f"{prefix}7.0.weight"] = torch.zeros(1)
    state[f"{prefix}0.0.weight"] = torch.zeros(3, 3)
    try:
        moe.load_state_dict(state)
        raise AssertionError("loaded")
    except RuntimeError as error:
        assert "size mismatch" in str(error) and f"{prefix}7.0.weight" in str(error)

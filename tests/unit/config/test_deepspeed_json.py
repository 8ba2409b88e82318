"""What DeepSpeed would refuse on every rank is refused when the config is read."""

import pytest

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.merge_rules import RULES
from ubsmoe_ds.config.methods import PRESETS

PARAMS = "deepspeed.optimizer.params"
REFUSED = {
    f"{PARAMS}.lr=auto": f"{PARAMS}.lr: 'auto' is not valid: only Hugging Face's Trainer fills in 'auto'",
    f"{PARAMS}.betas=auto": f"{PARAMS}.betas: 'auto' is not valid",
    f"{PARAMS}.weight_deacy=0.1": f"{PARAMS}.weight_deacy: unknown key (value 0.1); use one of lr,",
    f"{PARAMS}.lr=fast": f"{PARAMS}.lr: 'fast' is not valid: Input should be a valid number",
    f"{PARAMS}.lr=-1": f"{PARAMS}.lr: -1 is not valid",
    f"{PARAMS}.eps=-1.0": f"{PARAMS}.eps: -1.0 is not valid",
    f"{PARAMS}.betas=[0.9, 1.0]": f"{PARAMS}.betas.1: 1.0 is not valid",
    f"{PARAMS}.betas=[0.9]": f"{PARAMS}.betas: [0.9] is not valid",
    f"{PARAMS}.torch_adam=false": f"{PARAMS}.torch_adam: false is not supported",
    f"{PARAMS}.max_grad_norm=1.0": f"{PARAMS}.max_grad_norm: is no parameter; use deepspeed.gradient_clipping",
    f"{PARAMS}.capturable=true": f"{PARAMS}.capturable: True is not valid",
    f"{PARAMS}=0.1": "deepspeed.optimizer: params 0.1 must be key: value pairs",
    "deepspeed.optimizer.parms={}": "deepspeed.optimizer.parms: unknown key; it holds type and params; did you mean",
    "deepspeed.optimizer.type=AdmaW": "deepspeed.optimizer: type 'AdmaW' is no optimiser that works here; use one of",
    "deepspeed.optimizer.type=Lamb": "deepspeed.optimizer: type 'Lamb' is not supported: DeepSpeed's kernels keep",
    "deepspeed.optimizer.type=Adafactor": "deepspeed.optimizer: type 'Adafactor' is not supported: it keeps less",
    "deepspeed.optimizer.type=LBFGS": "deepspeed.optimizer: type 'LBFGS' is not supported: it calls the model",
    "deepspeed.optimizer.type=sgd": "did you mean 'SGD'?",  # DeepSpeed looks for torch.optim.sgd, a module
    "deepspeed.optimizer={type: SGD, params: {lr: 0.1, nesterov: true}}": "nesterov true needs a momentum above 0",
    f"{PARAMS}={{fused: true, foreach: true}}": f"{PARAMS}: fused and foreach cannot both be true",
    "deepspeed.scheduler={type: WarmupLr}": "deepspeed.scheduler: type 'WarmupLr' is no scheduler that works here",
    "deepspeed.scheduler={type: ReduceLROnPlateau}": "is no scheduler that works here",
    "deepspeed.scheduler={type: WarmupLR, params: {warmup_num_step: 3}}": "did you mean 'warmup_num_steps'?",
    "deepspeed.scheduler={type: WarmupLR, params: {warmup_num_steps: auto}}": "only Hugging Face's Trainer",
    "deepspeed.scheduler={type: WarmupLR, params: {warmup_type: cosine}}": "Input should be 'log' or 'linear'",
    "deepspeed.scheduler={type: WarmupDecayLR}": "deepspeed.scheduler.params.total_num_steps: is missing",
    "deepspeed.scheduler={type: OneCycle, params: {cycle_min_lr: 0.1}}": "cycle_max_lr: is missing",
    "deepspeed.zero_optimization={stage: 1, reduce_bucket_size: auto}": "reduce_bucket_size: 'auto' is not valid",
    "deepspeed.zero_optimization.overlap_com=true": "deepspeed.zero_optimization.overlap_com: unknown key",
    "deepspeed.zero_optimization.reduce_scatter=null": "deepspeed.zero_optimization.reduce_scatter: None is not valid",
    "deepspeed.zero_optimization.offload_param={device: cpu}": "offload_param is not supported",
    "deepspeed.bf16.bf16_optimizer_states=true": "deepspeed.bf16.bf16_optimizer_states: True is not valid",
    "deepspeed.data_types.grad_accum_dtype=bf16": "deepspeed.data_types.grad_accum_dtype: 'bf16' does not go with",
    "deepspeed.data_types.param_dtype=fp31": "did you mean 'fp32'?",
    "deepspeed.communication_data_type=fp8": "deepspeed.communication_data_type: 'fp8' is not valid",
    "deepspeed.gradient_predivide_factor=0": "deepspeed.gradient_predivide_factor: 0 is not valid",
    "deepspeed.comms_logger.enabld=true": "did you mean 'enabled'?",
    "deepspeed.train_batch_size=auto": "deepspeed.train_batch_size: 'auto' is not valid: only Hugging Face's",
}


def load(*overrides):
    return load_experiment("ds_configs/tiny.yaml", overrides)


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("override", REFUSED)
def test_what_deepspeed_would_refuse_names_key_and_value(override):
    assert REFUSED[override] in refusal(override)


def test_what_works_in_fp32_without_zero_alone():
    for kind in ("optimizer={type: Adagrad}", "scheduler={type: ExponentialLR, params: {gamma: 0.9}}"):
        assert load(f"deepspeed.{kind}").deepspeed.zero_stage == 0
        for other in ("zero_optimization.stage=1", "bf16.enabled=true"):
            assert "works in fp32 and at ZeRO stage 0 only" in refusal(f"deepspeed.{kind}", f"deepspeed.{other}")


def test_untested_optimisers_need_a_word_under_zero():
    sgd = ["deepspeed.optimizer={type: SGD}", "deepspeed.zero_optimization.stage=2"]
    assert "deepspeed.zero_allow_untested_optimizer=true" in refusal(*sgd)
    assert load(*sgd, "deepspeed.zero_allow_untested_optimizer=true").deepspeed.zero_stage == 2


def test_values_get_the_types_that_deepspeed_and_torch_need():
    """torch refuses whole numbers as betas; DeepSpeed takes 5e8 for a whole number; a schedule needs params."""
    exp = load(f"{PARAMS}.betas=[0, 0.9]", "deepspeed.zero_optimization={stage: 1, reduce_bucket_size: 5e8}")
    assert [type(beta) for beta in exp.deepspeed.optimizer["params"]["betas"]] == [float, float]
    assert type(exp.deepspeed.zero_optimization["reduce_bucket_size"]) is int
    assert load("deepspeed.scheduler={type: WarmupLR}").deepspeed.scheduler == {"type": "WarmupLR", "params": {}}


def test_an_experiment_survives_being_saved():
    exp = load("deepspeed.zero_optimization.stage=1", "deepspeed.scheduler={type: WarmupLR}")
    assert type(exp).model_validate(exp.model_dump()) == exp


@pytest.mark.parametrize("rule", RULES)
def test_moments_are_not_kept_where_the_basis_turns(rule):
    """flexlora and florist take an SVD, flora starts the adapters anew."""
    overrides = ["method=topk" if RULES[rule].elementwise else "method=hetlora_plain", f"merge.rule={rule}"]
    if rule in ("flexlora", "flora", "florist"):
        assert "train.optimizer_state: 'keep' does not work with merge.rule" in refusal(*overrides)
        overrides.append("train.optimizer_state=reset")
    assert load(*overrides).merge.rule == rule


@pytest.mark.parametrize("method", PRESETS)
def test_presets_reset_where_they_must(method):
    exp = load(f"method={method}")
    assert exp.train.optimizer_state == "reset" or not exp.merge.row.turns_basis

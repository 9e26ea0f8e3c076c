"""Every option of a run, declared once: type, default, bounds and one line of help.

The TOML file, `--set a.b=c`, `--dry-run` and the configuration reference all come from these structs. Torch-free.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]

Piece = dict[str, Any]
"""A registered part by `name`, beside its own options; the part itself declares and checks them."""


def option(text: str) -> Meta:
    return Meta(description=text)


LEAST_TEMPERATURE = 1e-5
"""but for 0: logits divided by less than this are rounding noise, and before long no numbers in float32"""


class Section(Struct, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration; a key it does not know is an error."""


class RunSection(Section):
    out: Annotated[str, option("run directory; an existing run in it is resumed")] = "runs/default"
    steps: Annotated[PositiveInt, option("optimiser batches to train")] = 100
    seed: Annotated[Annotated[int, Meta(ge=0, le=2**63 - 1)], option("seed of prompts, sampling, initialisation")] = 0
    engines: Annotated[PositiveInt, option("engine processes that `rollahead run` starts")] = 1
    restarts: Annotated[Count, option("times `rollahead run` restarts a process killed by a signal")] = 3
    measure_drafting: Annotated[bool, option("after `rollahead run`, time generation with and without drafting")] = True


class ModelSection(Section):
    path: Annotated[str, option("Hugging Face checkpoint directory; empty: the embedded model")] = ""
    warm_start_reward: Annotated[PositiveFloat, option("embedded model: the supervised warm start ends near this")] = (
        0.35
    )
    warm_start_seconds: Annotated[PositiveFloat, option("embedded model: the warm start's time limit")] = 170.0


class TaskSection(Section):
    kind: Annotated[
        Annotated[str, Meta(pattern=r"^(arithmetic|jsonl|datasets|[\w.]+:\w+)$")],
        option("where prompts come from: arithmetic, jsonl, datasets, or module:Class of your own"),
    ] = "arithmetic"
    digits: Annotated[Annotated[int, Meta(ge=1, le=12)], option("arithmetic: digits of the largest operand")] = 2
    operands: Annotated[Annotated[int, Meta(ge=2, le=8)], option("arithmetic: numbers to add")] = 3
    path: Annotated[str, option("jsonl: file of training samples, one object a line; datasets: name or folder")] = ""
    held_out_path: Annotated[str, option("jsonl: file of held-out samples")] = ""
    subset: Annotated[str, option("datasets: configuration of the dataset, where it has several")] = ""
    split: Annotated[str, option("datasets: split of training samples")] = "train"
    held_out_split: Annotated[str, option("datasets: split of held-out samples; empty: none")] = ""
    question_field: Annotated[str, option("jsonl, datasets: field that holds the question")] = "question"
    answer_field: Annotated[str, option("jsonl, datasets: field of the reference answer; empty: none")] = "answer"
    prompt_template: Annotated[str, option("jsonl, datasets: prompt text; {question} is replaced")] = (
        "Question: {question}\nAnswer:"
    )
    reward: Annotated[
        str | list[str], option("numeric-answer, or module:function with TRL's signature; several: a list, summed")
    ] = "numeric-answer"
    reward_weights: Annotated[list[float], option("weight of each of these in the sum; empty: 1 each")] = field(
        default_factory=list
    )
    reward_seconds: Annotated[NonNegativeFloat, option("module:function: limit of one call; 0: none")] = 60.0
    reward_memory_mb: Annotated[Count, option("module:function: limit of its process's memory, in MiB; 0: none")] = 4096
    reward_workers: Annotated[PositiveInt, option("module:function: processes an engine scores in")] = 1
    long_prompts: Annotated[Literal["error", "skip"], option("a prompt over sampling.max_prompt_tokens")] = "error"


class SamplingSection(Section):
    temperature: Annotated[NonNegativeFloat, option("softmax temperature of rollouts; 0 is greedy")] = 1.0
    top_k: Annotated[Count, option("draw from the k most likely tokens; 0: all")] = 0
    top_p: Annotated[
        Annotated[float, Meta(gt=0, le=1)], option("draw from the fewest tokens that have this probability together")
    ] = 1.0
    min_p: Annotated[
        Annotated[float, Meta(ge=0, le=1)], option("draw from tokens this likely, relative to the most likely one")
    ] = 0.0
    repetition_penalty: Annotated[PositiveFloat, option("divides logits of tokens of prompt and response; 1: off")] = (
        1.0
    )
    presence_penalty: Annotated[float, option("taken off logits of tokens of the response")] = 0.0
    frequency_penalty: Annotated[float, option("taken off logits of tokens of the response, for each time")] = 0.0
    logit_bias: Annotated[dict[str, float], option("token id -> added to its logit")] = field(default_factory=dict)
    allowed_token_ids: Annotated[list[Count], option("only these are drawn; empty: all")] = field(default_factory=list)
    bad_token_ids: Annotated[list[Count], option("these are never drawn")] = field(default_factory=list)
    stop_token_ids: Annotated[list[Count], option("end a response, beside the model's own end of text")] = field(
        default_factory=list
    )
    stop_strings: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        option("the token that completes one of these in the text ends a response"),
    ] = field(default_factory=list)
    min_new_tokens: Annotated[Count, option("before so many tokens a response cannot stop")] = 0
    max_prompt_tokens: Annotated[PositiveInt, option("longest prompt, in tokens")] = 512
    max_new_tokens: Annotated[PositiveInt, option("longest response, in tokens")] = 512


class SwitchingSection(Section):
    small_model: Annotated[
        str, option("smaller checkpoint of the same tokenizer that samples where entropy is low; empty: none")
    ] = ""
    threshold: Annotated[
        NonNegativeFloat, option("the policy samples while the rolling mean of entropies is above this")
    ] = 0.1
    unit: Annotated[Literal["nats", "bits"], option("of the threshold")] = "nats"
    window: Annotated[Tokens, option("tokens of the rolling mean")] = 5
    min_run: Annotated[Tokens, option("tokens from one switch to the next, at least")] = 10
    before_sampling: Annotated[
        bool, option("the policy samples the token that the small model is uncertain of, not only what follows it")
    ] = False
    policy_share: Annotated[
        Annotated[float, Meta(ge=0, lt=1)],
        option("share of tokens the policy is to sample; an engine finds the threshold when it starts; 0: it is given"),
    ] = 0.0
    calibration_prompts: Annotated[PositiveInt, option("prompts the calibration generates from")] = 32
    calibration_path: Annotated[
        str, option("jsonl file of these, in the task's form; empty: training prompts, in an order of their own")
    ] = ""
    evaluation: Annotated[bool, option("switch in evaluations, too")] = False
    distill: Annotated[
        bool, option("the learner trains the small model on fresh rollouts to be like the policy, and publishes both")
    ] = False
    distill_learning_rate: Annotated[PositiveFloat, option("AdamW learning rate of that")] = 1e-5
    distill_tokens: Annotated[Tokens, option("most tokens of a batch that it reads, prompts included")] = 8192


class KVCompressionSection(Section):
    policy: Annotated[Piece, option("what stays: none (all), sinks-window, snapkv, r-kv or module:Class")] = field(
        default_factory=lambda: {"name": "none"}
    )
    budget: Annotated[PositiveInt, option("tokens of a sequence whose keys and values a compression leaves")] = 512
    every: Annotated[PositiveInt, option("tokens from one compression to the next")] = 128
    evaluation: Annotated[bool, option("compress in evaluations, too")] = False


class EngineSection(Section):
    generator: Annotated[Literal["native", "vllm"], option("what generates")] = "native"
    vllm: Annotated[dict[str, Any], option("generator vllm: arguments of its engine, passed through")] = field(
        default_factory=dict
    )
    threads: Annotated[Count, option("torch threads of an engine; 0: chosen from the machine's cores")] = 0
    max_sequences: Annotated[PositiveInt, option("sequences generated at once by one engine")] = 64
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        option("compute type; auto: the checkpoint's, or on a CPU float32 where that is measured to be faster"),
    ] = "auto"
    device: Annotated[str, option("auto, cpu, cuda or cuda:N")] = "auto"
    verification: Annotated[
        Literal["standard", "block"], option("rule for drafts that bring probabilities; both are exact")
    ] = "standard"
    kv_bytes: Annotated[
        Count, option("memory for keys and values, in bytes; 0: for max_sequences, at most half of what is free")
    ] = 0
    kv_compression: KVCompressionSection = field(default_factory=KVCompressionSection)
    prefill_tokens: Annotated[PositiveInt, option("prompt tokens computed between two generation steps")] = 2048
    update_kv: Annotated[
        Literal["keep", "recompute"], option("keys and values of sequences under way when new weights arrive")
    ] = "keep"
    max_draft_tokens: Annotated[Annotated[int, Meta(ge=0, le=128)], option("longest draft a verification")] = 16
    drafter: Annotated[Piece, option("drafter by name or module:Class, with its options")] = field(
        default_factory=lambda: {"name": "arbiter", "drafters": ["suffix-automaton"]}
    )
    drafter_seconds: Annotated[
        Annotated[float, Meta(gt=0, le=86400)], option("longest call of a drafter; a longer one switches it off")
    ] = 20.0
    switching: SwitchingSection = field(default_factory=SwitchingSection)
    stagger: Annotated[bool, option("of more samples than run at once, one of each group goes ahead of the others")] = (
        True
    )
    spool_bytes: Annotated[PositiveInt, option("unacknowledged trajectories an engine keeps on disk, in bytes")] = (
        256 << 20
    )


class TransportSection(Section):
    address: Annotated[str, option("where the learner listens")] = "tcp://127.0.0.1:5757"
    connect_timeout: Annotated[NonNegativeFloat, option("seconds an engine waits for the learner; 0: for ever")] = 600.0
    heartbeat_seconds: Annotated[PositiveFloat, option("between an engine's progress messages")] = 1.0
    lease_seconds: Annotated[PositiveFloat, option("a lease without progress is reissued after this")] = 30.0
    journal_bytes: Annotated[PositiveInt, option("journal size that forces a checkpoint, in bytes")] = 1 << 30
    max_message_bytes: Annotated[Annotated[int, Meta(ge=1 << 20)], option("largest message accepted")] = 64 << 20
    window_bytes: Annotated[
        PositiveInt, option("bytes that all engines together may have sent before the journal holds them")
    ] = 256 << 20
    fsync: Annotated[
        bool, option("sync spool and journal before samples are acknowledged; false survives kills, not power cuts")
    ] = True
    stall_seconds: Annotated[
        NonNegativeFloat, option("a process without progress for this long is ended; 0: never")
    ] = 1800.0
    keys: Annotated[str, option("folder of keys made by `rollahead keygen`; empty: this machine only")] = ""
    engine_key: Annotated[str, option("name of the engine's key in transport.keys")] = "engine"
    insecure: Annotated[bool, option("listen for other machines without keys")] = False


class WeightsSection(Section):
    transport: Annotated[
        Literal["filesystem", "stream"], option("filesystem: engines read run.out; stream: over the connection")
    ] = "filesystem"
    transfer: Annotated[
        Literal["files", "collective"],
        option("files: as transport says; collective: running engines receive by torch.distributed"),
    ] = "files"
    address: Annotated[str, option("collective: where the learner's end of it listens; port 0: any that is free")] = (
        "tcp://127.0.0.1:0"
    )
    transfer_seconds: Annotated[
        PositiveFloat, option("collective: wait of one side for the other, after which the version is read as files")
    ] = 60.0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], option("type of published weights; auto: the checkpoint's")
    ] = "auto"
    keep: Annotated[Annotated[int, Meta(ge=2)], option("published versions kept on disk")] = 3


class LearnerSection(Section):
    threads: Annotated[Count, option("torch threads of the learner; 0: chosen from the machine's cores")] = 0
    device: Annotated[str, option("auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16"], option("type of the layers' matrix products; weights stay float32")
    ] = "float32"
    batch_size: Annotated[PositiveInt, option("samples an optimiser batch; a multiple of group_size")] = 64
    group_size: Annotated[PositiveInt, option("samples a prompt")] = 8
    minibatches: Annotated[PositiveInt, option("optimiser steps a batch")] = 2
    micro_batch_tokens: Annotated[PositiveInt, option("tokens a forward-backward pass, packed without padding")] = 4096
    gradient_checkpointing: Annotated[
        bool, option("keep only the layers' inputs for the backward pass and compute the layers again in it")
    ] = False
    learning_rate: Annotated[PositiveFloat, option("AdamW learning rate after warm-up")] = 1e-5
    warmup_steps: Annotated[Count, option("batches of linear learning-rate warm-up")] = 0
    learning_rate_schedule: Annotated[
        Literal["constant", "linear", "cosine"], option("after warm-up; linear and cosine end with run.steps")
    ] = "constant"
    final_learning_rate: Annotated[
        Annotated[float, Meta(ge=0, le=1)], option("share of learning_rate that linear and cosine end with")
    ] = 0.0
    weight_decay: Annotated[NonNegativeFloat, option("AdamW weight decay of matrices")] = 0.0
    beta1: Annotated[Annotated[float, Meta(ge=0, lt=1)], option("AdamW first-moment decay")] = 0.9
    beta2: Annotated[Annotated[float, Meta(ge=0, lt=1)], option("AdamW second-moment decay")] = 0.99
    max_grad_norm: Annotated[PositiveFloat, option("gradient norm is clipped to this")] = 1.0
    max_update_norm: Annotated[
        NonNegativeFloat, option("an optimiser step whose gradient norm is above this is skipped; 0: any is taken")
    ] = 0.0
    max_skipped_steps: Annotated[PositiveInt, option("optimiser steps skipped in a row before giving up")] = 10
    dump_batches: Annotated[Count, option("newest batches kept in batches/, for python -m learner.replay")] = 0
    max_staleness: Annotated[Count, option("batches that rollouts may run ahead; 0: synchronous")] = 1
    max_age: Annotated[Count, option("drop samples whose oldest token is older, in publications; 0: never")] = 0
    reference_path: Annotated[
        str, option("checkpoint that pieces such as kl refer to; empty: the weights the run starts from")
    ] = ""
    dynamic_sampling: Annotated[bool, option("leave out groups whose rewards are all equal, and draw others")] = False
    max_filtered_batches: Annotated[
        PositiveInt, option("batches' worth of groups left out in a row before giving up")
    ] = 10
    eval_every: Annotated[Count, option("batches between evaluations on held-out prompts; 0: none")] = 0
    eval_prompts: Annotated[PositiveInt, option("held-out prompts an evaluation")] = 64
    eval_samples: Annotated[PositiveInt, option("samples a prompt in an evaluation, for pass@k")] = 4
    eval_temperature: Annotated[NonNegativeFloat, option("softmax temperature of evaluations; 0 is greedy")] = 1.0
    eval_success: Annotated[float, option("evaluation: reward from which a sample counts as solved")] = 1.0
    checkpoint_every: Annotated[PositiveInt, option("batches between checkpoints")] = 20
    keep_checkpoints: Annotated[PositiveInt, option("checkpoints kept on disk")] = 2


class TelemetrySection(Section):
    tensorboard: Annotated[bool, option("write TensorBoard event files into tensorboard/ of the run")] = True
    samples: Annotated[Count, option("samples of each batch written as text, with who drafted what; 0: none")] = 2
    trace: Annotated[bool, option("write what each process did when into trace/, for Perfetto and Chrome")] = True
    prometheus_port: Annotated[
        Annotated[int, Meta(ge=0, le=65534)],
        option("port of the learner's /metrics and /health; engines take the next free ones; 0: none"),
    ] = 0
    prometheus_host: Annotated[str, option("address these are served on")] = "127.0.0.1"
    wandb: Annotated[str, option("Weights & Biases project; empty: none (needs the extra wandb)")] = ""
    log_format: Annotated[Literal["text", "json"], option("of what processes write on stderr")] = "text"


def _piece(name: str, **options: Any) -> Any:
    return field(default_factory=lambda: {"name": name, **options})


class ObjectiveSection(Section):
    recipe: Annotated[str, option("named settings of a paper (docs/objectives.md); other keys override it")] = ""
    reconstructed: Annotated[bool, option("allow pieces that are our reconstruction of a paper")] = False
    shaping: Annotated[list[Piece], option("changes of the reward, applied in order")] = field(default_factory=list)
    advantage: Annotated[Piece, option("advantage estimator")] = _piece("grpo")
    modulators: Annotated[list[Piece], option("changes of tokens' advantages, applied in order")] = field(
        default_factory=list
    )
    proximal: Annotated[
        Literal["recompute", "behaviour", "interpolate"],
        option("pi_old: the learner's own pass, the engine's log-probs, or between them and pi by version"),
    ] = "recompute"
    corrections: Annotated[list[Piece], option("off-policy corrections, applied in order")] = field(
        default_factory=lambda: [{"name": "tis"}]
    )
    surrogate: Annotated[Piece, option("policy-gradient surrogate")] = _piece("ppo-clip")
    gates: Annotated[list[Piece], option("token gates, applied in order")] = field(
        default_factory=lambda: [{"name": "erc"}]
    )
    regularisers: Annotated[list[Piece], option("terms added to the loss")] = field(default_factory=list)
    aggregation: Annotated[Piece, option("how the losses of tokens are added up")] = _piece("token-mean")


DraftLoss = Literal["ce", "kl", "tv", "e2e-tv", "lk-alpha", "lk-lambda"]


class DrafterSection(Section):
    texts: Annotated[
        list[str],
        option("files to train a head on: text, .jsonl, rollouts.jsonl; empty: the policy's own responses to the task"),
    ] = field(default_factory=list)
    template: Annotated[str, option("text of a line of a .jsonl file; {field} is replaced")] = "{text}"
    rollouts: Annotated[PositiveInt, option("responses that the policy generates to train a head on")] = 4096
    held_out: Annotated[PositiveInt, option("texts kept for measuring acceptance, not trained on")] = 128
    start: Annotated[
        str, option("folder of the head to begin with; empty: the model's own, or one made of its last layer")
    ] = ""
    loss: Annotated[DraftLoss, option("what a head is trained for")] = "e2e-tv"
    warm_up: Annotated[
        Annotated[float, Meta(ge=0, le=1)], option("part of the steps that tv and e2e-tv are preceded by warm_up_loss")
    ] = 0.5
    warm_up_loss: Annotated[Literal["ce", "kl", "lk-alpha", "lk-lambda"], option("loss of that part")] = "lk-lambda"
    depths: Annotated[Annotated[int, Meta(ge=1, le=16)], option("tokens ahead that a head is trained for")] = 3
    depth_decay: Annotated[
        Annotated[float, Meta(gt=0, le=1)], option("weight of each depth's loss against the one before; not of e2e-tv")
    ] = 0.8
    steps: Annotated[PositiveInt, option("optimiser steps")] = 1000
    seconds: Annotated[
        NonNegativeFloat, option("training ends after so many seconds of steps; 0: at the last step")
    ] = 0
    batch_tokens: Annotated[PositiveInt, option("tokens an optimiser step, with padding")] = 4096
    optimizer: Annotated[
        Literal["muon", "adamw"], option("what steps a head's matrices; its vectors are AdamW's. Co-training: adamw")
    ] = "muon"
    matrix_learning_rate: Annotated[PositiveFloat, option("Muon learning rate of the matrices after warm-up")] = 0.1
    learning_rate: Annotated[PositiveFloat, option("AdamW learning rate after warm-up")] = 1e-3
    max_grad_norm: Annotated[PositiveFloat, option("gradient norm is clipped to this")] = 1.0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], option("type of matrix products; auto: bfloat16 where that is fast")
    ] = "auto"
    eval_every: Annotated[PositiveInt, option("steps between measurements of acceptance on held-out texts")] = 100
    co_train: Annotated[
        bool,
        option("the learner trains the head on fresh rollouts, apart from the policy, and publishes both together"),
    ] = False
    co_learning_rate: Annotated[PositiveFloat, option("AdamW learning rate of that; the loss is drafter.loss")] = 3.5e-5
    checkpoint_every: Annotated[PositiveInt, option("steps between checkpoints")] = 100


class Config(Section):
    """A whole run. Engine and learner read the same file; each uses its own tables."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    task: TaskSection = field(default_factory=TaskSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    engine: EngineSection = field(default_factory=EngineSection)
    transport: TransportSection = field(default_factory=TransportSection)
    weights: WeightsSection = field(default_factory=WeightsSection)
    learner: LearnerSection = field(default_factory=LearnerSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    drafter: DrafterSection = field(default_factory=DrafterSection)
    telemetry: TelemetrySection = field(default_factory=TelemetrySection)

"""Real architectures: small random ones of transformers, each with the parameters that never train in it."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from gradwatch import diagnose

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs" / "real_models.md"
LENGTH = 12
VOCABULARY = 60
NAMES = {
    "CausalLM": """afmoe apertus apertus1p5_text arcee aria_text bart bert bert-generation big_bird
        bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom camembert cohere cohere2 cohere2_moe
        cpmant ctrl cwm data2vec-text deepseek_v4 diffllama doge electra ernie ernie4_5
        ernie4_5_moe exaone4 exaone_moe falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4
        glm4_moe gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss granite granitemoe granitemoeshared
        helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 jais2 jetmoe lfm2 llama llama4_text mamba marian
        mbart megatron-bert minimax minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder moshi
        mpt mvp nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus
        persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_moe rembert roberta
        roberta-prelayernorm roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma
        whisper xglm xlm xlm-roberta xlm-roberta-xl""",
    "MaskedLM": """albert bart bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert
        electra ernie esm eurobert flaubert fnet gte ibert jina_embeddings_v3 layoutlm longformer mbart
        megatron-bert mobilebert modernbert mpnet mra mvp nomic_bert nystromformer rembert roberta
        roberta-prelayernorm roformer squeezebert tapas xlm xlm-roberta xlm-roberta-xl yoso""",
    "Seq2SeqLM": """bart bigbird_pegasus blenderbot blenderbot-small fsmt led m2m_100 marian mbart mt5 mvp
        nllb-moe pegasus pegasus_x plbart umt5""",
}
CASES = [f"{kind}:{name}" for kind, names in NAMES.items() for name in names.split()]

DECODERS = (
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper"
)
CROSS_ATTENTION = ("unused", "model.decoder.layers.*.encoder_attn*")
POOLER = ("not_in_loss", "*.pooler.*")
GLOBAL_ATTENTION = ("unused", "*_global.*")
COMPRESSOR = "model.layers.*.self_attn.compressor."
FINDS = {
    **{f"CausalLM:{name}": [CROSS_ATTENTION] for name in DECODERS.split()},
    "CausalLM:big_bird": [POOLER],
    "MaskedLM:big_bird": [POOLER],
    "MaskedLM:fnet": [POOLER],
    "MaskedLM:layoutlm": [POOLER],
    "MaskedLM:squeezebert": [POOLER],
    "MaskedLM:longformer": [GLOBAL_ATTENTION],
    "Seq2SeqLM:led": [GLOBAL_ATTENTION],
    "MaskedLM:esm": [("unused", "esm.contact_head.*")],
    "CausalLM:hy_v4": [("no_grad", "model.layers.*.self_attn.indexer.*")],
    "CausalLM:deepseek_v4": [
        ("not_in_loss", f"{COMPRESSOR}gate_proj.*"),
        ("not_in_loss", f"{COMPRESSOR}kv_proj.*"),
        ("unused", f"{COMPRESSOR}kv_norm.*"),
        ("unused", f"{COMPRESSOR}position_bias"),
    ],
    "MaskedLM:mra": [
        ("not_in_loss", f"mra.encoder.layer.*.attention.self.{part}.*")
        for part in ("query", "key", "value")
    ],
}
"""By architecture the parameters that get no gradient, as globs with their causes."""

SIZES = [
    (
        0.0,
        "layerdrop encoder_layerdrop decoder_layerdrop dropout attention_dropout hidden_dropout_prob",
    ),
    (0.0, "attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop"),
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id"),
    (2, "eos_token_id num_hidden_layers encoder_layers decoder_layers num_layers n_layer n_layers"),
    (2, "num_decoder_layers num_key_value_heads type_vocab_size num_experts_per_tok expand"),
    (
        4,
        "num_attention_heads encoder_attention_heads decoder_attention_heads n_head n_heads num_heads",
    ),
    (
        4,
        "num_ssm_heads num_experts num_local_experts n_routed_experts qk_rope_head_dim time_step_rank",
    ),
    (
        8,
        "head_dim d_kv d_head q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim state_size mem_len",
    ),
    (8, "mamba_d_state attention_window window_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size"),
    (32, "hidden_size d_model n_embd dim embed_dim embedding_size embedding_dim lru_width"),
    (
        48,
        "intermediate_size encoder_ffn_dim decoder_ffn_dim d_ff ffn_dim n_inner hidden_dim d_inner",
    ),
    (VOCABULARY, "vocab_size"),
    (64, "max_position_embeddings n_positions n_ctx max_target_positions"),
]
SMALL = {key: size for size, keys in SIZES for key in keys.split()}


def build(case):
    """Return a small random model, and a batch for it."""
    kind, _, name = case.partition(":")
    config_class = transformers.CONFIG_MAPPING[name]
    known = config_class()
    config = config_class(**{key: value for key, value in SMALL.items() if hasattr(known, key)})
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}")._model_mapping[config_class](config)
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH))
    return model.train(), {"input_ids": tokens, "labels": tokens}


def one_pass(model, batch):
    """Return the loss and the gradients of a pass from a fixed seed."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**batch).loss
    loss.backward()
    return [
        loss.detach(),
        *(None if p.grad is None else p.grad.clone() for p in model.parameters()),
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_architecture(case):
    """An architecture trains as it does without us, and just those parameters that are known to be dead are named."""
    model, batch = build(case)
    plain = one_pass(model, batch)

    with diagnose(model) as diagnosis:
        watched = one_pass(model, batch)

    torch.testing.assert_close(watched, plain, rtol=0, atol=0, equal_nan=True)
    found = {
        (str(d.cause), name)
        for d in diagnosis.report.diagnoses
        if d.status == "missing"
        for name in d.parameters
    }
    assert found == {
        (cause, name)
        for cause, glob in FINDS.get(case, [])
        for name, _ in model.named_parameters()
        if fnmatchcase(name, glob)
    }


def test_the_page_lists_what_was_found():
    """The table of the documentation has a row for each find, and no other."""
    rows = re.findall(r"^\| `(\S+)` \| .*? \| `(\S+)` \| `(\w+)`", DOCS.read_text(), re.MULTILINE)

    assert f"{len(CASES)} architectures" in DOCS.read_text()
    assert f"In {len(CASES) - len(FINDS)} of them" in DOCS.read_text()
    assert sorted(rows) == sorted(
        (case, glob, cause) for case, finds in FINDS.items() for cause, glob in finds
    )


def test_a_library_that_runs_without_gradients_is_one_diagnosis():
    """A backbone under `no_grad` is named once, at the user's call, whatever lines of the library it runs."""
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    model = torch.nn.ModuleDict(
        {"backbone": transformers.BertModel(config), "head": torch.nn.Linear(8, 2)}
    )

    with diagnose(model) as diagnosis:
        with torch.no_grad():
            hidden = model["backbone"](torch.ones(1, 4, dtype=torch.long)).pooler_output
        model["head"](hidden).mean().backward()

    (found,) = diagnosis.report.diagnoses
    assert found.cause == "no_grad"
    assert len(found.parameters) == sum(
        name.startswith("backbone") for name in diagnosis.report.statuses
    )
    assert found.site.caller.file == __file__

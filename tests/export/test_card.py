"""The model card says how to load what is there, and nothing about what is not."""

import dataclasses

from srr_dist.export.card import CardFacts, model_card

FACTS = CardFacts(
    model="org/Model-8B",
    method="srr",
    widths=(3,),
    group_size=32,
    rank=24,
    bits_per_weight=3.68,
    base_bytes=4 * 2**30,
    adapter_bytes=90 * 2**20,
    dense_bytes=16 * 2**30,
    exports=("adapter", "base"),
)


def test_card_states_how_to_load_and_serve_base_and_adapter():
    card = model_card(FACTS).replace("\N{NO-BREAK SPACE}", " ")
    assert 'PeftModel.from_pretrained(model, "adapter")' in card
    assert "vllm serve ./base --enable-lora --max-lora-rank 32 --lora-modules srr=./adapter" in card
    for stated in ("# org/Model-8B, 3 bits", "3.68 bits", "4 GiB", "90 MiB", "they take 16 GiB of memory"):
        assert stated in card
    assert "Merged weights" not in card
    assert "Measured" not in card


def test_card_states_what_a_group_shares():
    for symmetric, group_size, stated in (
        (True, 32, "3-bit codes, a scale per 32 inputs"),
        (False, 32, "3-bit codes, a zero point and a scale per 32 inputs"),
        (True, -1, "3-bit codes, a scale per output channel"),
    ):
        assert stated in model_card(dataclasses.replace(FACTS, symmetric=symmetric, group_size=group_size))


def test_card_of_codes_in_a_table_names_it_and_who_reads_it():
    card = model_card(dataclasses.replace(FACTS, widths=(4,), group_size=64, codebook="nf4"))
    assert "4-bit NF4 codes, a scale per 64 inputs" in card
    assert "`pip install transformers bitsandbytes peft`" in card
    assert "stay packed" in card and "compressed-tensors" not in card and "expands the weights" not in card


def test_card_of_layers_that_differ_in_bits_names_their_widths():
    for widths, title, stated in (
        ((3, 4), "# org/Model-8B, 3 to 4 bits", "3- and 4-bit codes"),
        ((2, 3, 5), "# org/Model-8B, 2 to 5 bits", "2-, 3- and 5-bit codes"),
    ):
        card = model_card(dataclasses.replace(FACTS, widths=widths))
        assert title in card
        assert stated in card
        assert card.index("decompress_model(model)") < card.index('PeftModel.from_pretrained(model, "adapter")')
    assert "decompress_model" not in model_card(FACTS)


def test_card_loading_code_is_python():
    code = model_card(FACTS).split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert code.count("from_pretrained") == 3


def test_card_without_adapter_mentions_neither_peft_nor_lora():
    card = model_card(dataclasses.replace(FACTS, method="none", rank=0, exports=("base",)))
    assert "vllm serve ./base\n" in card
    assert "peft" not in card.lower()
    assert "lora" not in card


def test_card_rank_that_vllm_cannot_serve_points_to_the_merged_export():
    card = model_card(dataclasses.replace(FACTS, rank=600))
    assert "up to rank 512; these have rank 600" in card
    assert "vllm serve" not in card


def test_card_of_merged_weights_alone_describes_only_them():
    card = model_card(dataclasses.replace(FACTS, exports=("dense",))).replace("\N{NO-BREAK SPACE}", " ")
    assert "`dense/` holds Q + L·R as an ordinary checkpoint of 16 GiB" in card
    assert "from_pretrained" not in card


def test_card_lists_what_was_measured():
    card = model_card(dataclasses.replace(FACTS, evaluation={"perplexity, WikiText-2": 10.7812}))
    assert "| perplexity, WikiText-2 | 10.781 |" in card

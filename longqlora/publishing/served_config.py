"""``config.json`` as every reader of a published model understands it.

transformers 5 keeps all that concerns RoPE in ``rope_parameters``. transformers 4 does not know that key: without
``rope_theta`` and ``rope_scaling`` at the top level, it computes with a theta of 10000 and no scaling, and says nothing (tried
with 4.57). By their code, versions of vLLM that build on it and older converters of llama.cpp do the same; those converters
also look for ``original_max_position_embeddings`` there, and take 8192 for llama3 if they find none.
"""

NOT_OF_THE_SCALING = ("rope_theta", "partial_rotary_factor")


def served_config(config: dict) -> dict:
    """A configuration with the same RoPE in the old keys, too. transformers computes the same with it.

    Args:
        config: a ``config.json`` of transformers 5.
    """
    rope = config.get("rope_parameters")
    if not rope:
        return config
    added = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        added["rope_scaling"] = {key: value for key, value in rope.items() if key not in NOT_OF_THE_SCALING}
    if "original_max_position_embeddings" in rope:
        added["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return config | added

"""Families whose image, question and answer are not one text: cross-attention, encoder and decoder, marked rows."""

from __future__ import annotations

from pathlib import Path

from tokenizers import processors as post
from transformers import PreTrainedTokenizerFast

from tests.tiny import INIT, INK_STD, PAPER_MEAN, _save, byte_level_tokenizer, metaspace_tokenizer

INK = {"image_mean": PAPER_MEAN, "image_std": INK_STD}
SMALL_OPT = {
    "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512, "dropout": 0.0,
    "init_std": INIT,
}  # fmt: skip


def _llama_like(vocab_size: int = 640, extra: tuple[str, ...] = (), **named: str) -> PreTrainedTokenizerFast:
    return metaspace_tokenizer(
        vocab_size, ["<s>", "</s>", "<pad>", *extra], bos_token="<s>", eos_token="</s>", pad_token="<pad>", **named
    )


def _bart_like(extra: tuple[str, ...] = (), **named: object) -> PreTrainedTokenizerFast:
    """Byte-level, with begin and end marks around every text, in the manner of BART and RoBERTa."""
    special = ["<s>", "<pad>", "</s>", "<unk>", *extra]
    tokenizer = byte_level_tokenizer(
        600, special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", cls_token="<s>",
        sep_token="</s>", **named,
    )  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>")}
    tokenizer.backend_tokenizer.post_processor = post.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=list(ids.items())
    )
    return tokenizer


def _bert_like() -> PreTrainedTokenizerFast:
    """Word pieces between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from tests.tiny import CORPUS

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    marks = [(name, inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = post.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=marks
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", padding_side="right",
    )  # fmt: skip


def _t5_like(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Sentence pieces with an end mark, in the manner of T5."""
    tokenizer = metaspace_tokenizer(640, ["<pad>", "</s>", *extra], eos_token="</s>", pad_token="<pad>")
    end = tokenizer.convert_tokens_to_ids("</s>")
    tokenizer.backend_tokenizer.post_processor = post.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    return tokenizer


MLLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def mllama(folder: Path, *, seed: int = 0) -> Path:
    """Llama 3.2 Vision: tiles of a page, read through gated cross-attention layers."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
               "<|finetune_right_pad_id|>", "<|python_tag|>"]  # fmt: skip
    tokenizer = byte_level_tokenizer(
        600, special, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>"
    )
    n_answers = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})  # beyond the head, as in Llama 3.2
    ids = tokenizer.convert_tokens_to_ids
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 4, "image_size": 56, "patch_size": 14, "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "initializer_range": INIT,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        text_config={
            "vocab_size": n_answers, "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1],
            "max_position_embeddings": 512, "initializer_range": INIT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": ids("<|begin_of_text|>"), "eos_token_id": ids("<|eot_id|>"),
            "pad_token_id": ids("<|finetune_right_pad_id|>"),
        },
        image_token_index=ids("<|image|>"),
    )  # fmt: skip
    processor = MllamaProcessor(
        MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=4, **INK), tokenizer,
        chat_template=MLLAMA_TEMPLATE,
    )  # fmt: skip
    return _save(_awake(MllamaForConditionalGeneration), config, processor, folder, seed, True)


def _awake(kind: type) -> type:
    """What starts at zero (gates, query tokens, a projection) and would hide the image does not."""

    def build(config: object) -> object:
        model = kind(config)
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if last in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
                parameter.data.fill_(0.8)
            elif last in ("query_tokens", "mm_input_projection_weight"):
                parameter.data.normal_(std=0.3)
        return model

    return build  # type: ignore[return-value]


def florence2(folder: Path, *, seed: int = 0) -> Path:
    """Florence-2: DaViT, a mean token and a grid in BART's encoder, answers from its decoder."""
    from transformers import CLIPImageProcessor, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

    tokenizer = _bart_like(("<image>",), extra_special_tokens={"image_token": "<image>"})
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 40, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 512, "dropout": 0.0, "attention_dropout": 0.0, "init_std": INIT,
        "bos_token_id": ids("<s>"), "eos_token_id": ids("</s>"), "pad_token_id": ids("<pad>"),
        "decoder_start_token_id": ids("</s>"), "forced_bos_token_id": ids("<s>"), "forced_eos_token_id": ids("</s>"),
    }  # fmt: skip
    config = Florence2Config(
        vision_config={
            "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
            "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4],
            "window_size": 4, "drop_path_rate": 0.0, "projection_dim": 40, "max_temporal_embeddings": 4,
            "max_position_embeddings": 10, "initializer_range": 0.02,
        },
        text_config=text, image_token_id=ids("<image>"),
    )  # fmt: skip
    image = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, **INK)
    image.image_seq_length = 65
    processor = Florence2Processor(image, tokenizer)
    return _save(Florence2ForConditionalGeneration, config, processor, folder, seed, True)


def _blip2(folder: Path, seed: int, text: dict, tokenizer: PreTrainedTokenizerFast) -> Path:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    processor = Blip2Processor(
        BlipImageProcessor(size={"height": 56, "width": 56}, **INK), tokenizer, num_query_tokens=4
    )
    config = Blip2Config(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 56, "patch_size": 14, "initializer_range": INIT},
        qformer_config={"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "encoder_hidden_size": 32, "vocab_size": 100, "initializer_range": INIT,
                        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config={**text, "vocab_size": len(tokenizer)},
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        initializer_range=INIT,
    )  # fmt: skip
    return _save(_awake(Blip2ForConditionalGeneration), config, processor, folder, seed, True)


def blip2(folder: Path, *, seed: int = 0) -> Path:
    """BLIP-2 with OPT: query tokens in front of the begin mark."""
    tokenizer = _bart_like()
    tokenizer.backend_tokenizer.post_processor = post.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.convert_tokens_to_ids("</s>"))]
    )
    text = {"model_type": "opt", "hidden_size": 40, "word_embed_proj_dim": 40, **SMALL_OPT}
    return _blip2(folder, seed, text, tokenizer)


def blip2_t5(folder: Path, *, seed: int = 0) -> Path:
    """BLIP-2 with T5: query tokens in front of the encoder's text."""
    tokenizer = _t5_like()
    text = {
        "model_type": "t5", "d_model": 40, "d_kv": 10, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    text["decoder_start_token_id"] = tokenizer.pad_token_id
    return _blip2(folder, seed, text, tokenizer)


def kosmos2(folder: Path, *, seed: int = 0) -> Path:
    """Kosmos-2: latent queries in a marked run of the text."""
    from transformers import CLIPImageProcessor, Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor

    tokenizer = _llama_like(700)
    processor = Kosmos2Processor(
        CLIPImageProcessor(size={"height": 56, "width": 56}, do_center_crop=False, **INK), tokenizer, 16
    )
    config = Kosmos2Config(
        text_config={"vocab_size": len(tokenizer), "embed_dim": 40, "layers": 2, "ffn_dim": 64, "attention_heads": 4,
                     "max_position_embeddings": 512, "dropout": 0.0, "attention_dropout": 0.0, "init_std": INIT,
                     "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 56, "patch_size": 14, "initializer_range": INIT},
        latent_query_num=64,
    )  # fmt: skip
    return _save(Kosmos2ForConditionalGeneration, config, processor, folder, seed, True)


def pix2struct(folder: Path, *, seed: int = 0) -> Path:
    """Pix2Struct: patches of the whole page, as many as fit; question and answer in the decoder."""
    from transformers import (
        Pix2StructConfig,
        Pix2StructForConditionalGeneration,
        Pix2StructImageProcessor,
        Pix2StructProcessor,
    )

    tokenizer = _t5_like()
    tokenizer.model_max_length = 512
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
             "decoder_start_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = Pix2StructConfig(
        text_config={"vocab_size": len(tokenizer), "hidden_size": 40, "d_kv": 10, "d_ff": 64, "num_layers": 2,
                     "num_heads": 4, "dropout_rate": 0.0, **marks},
        vision_config={"hidden_size": 40, "patch_embed_hidden_size": 192, "d_ff": 64, "d_kv": 10,
                       "num_hidden_layers": 2,
                       "num_attention_heads": 4, "dropout_rate": 0.0, "attention_dropout": 0.0, "seq_len": 64,
                       "patch_size": 8},
        is_vqa=False, **marks,
    )  # fmt: skip
    processor = Pix2StructProcessor(
        Pix2StructImageProcessor(max_patches=40, patch_size={"height": 8, "width": 8}), tokenizer
    )
    return _save(Pix2StructForConditionalGeneration, config, processor, folder, seed, True)


def blip(folder: Path, *, seed: int = 0) -> Path:
    """BLIP: a BERT that attends to a vision transformer of another width."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    tokenizer = _bert_like()
    config = BlipConfig(
        text_config={"vocab_size": len(tokenizer) + 1, "hidden_size": 40, "encoder_hidden_size": 32,
                     "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "max_position_embeddings": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                     "initializer_range": INIT, "bos_token_id": len(tokenizer),
                     "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.sep_token_id,
                     "sep_token_id": tokenizer.sep_token_id, "projection_dim": 16},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 56, "patch_size": 14, "initializer_range": INIT, "projection_dim": 16},
        projection_dim=16,
    )  # fmt: skip
    processor = BlipProcessor(BlipImageProcessor(size={"height": 56, "width": 56}, **INK), tokenizer)
    return _save(BlipForConditionalGeneration, config, processor, folder, seed, True)


def git(folder: Path, *, seed: int = 0) -> Path:
    """GIT: projected patches in front of the text, without a placeholder."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    tokenizer = _bert_like()
    config = GitConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 56, "patch_size": 14, "initializer_range": INIT},
        vocab_size=len(tokenizer), hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=512, initializer_range=INIT,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    image = CLIPImageProcessor(size={"height": 56, "width": 56}, do_center_crop=False, **INK)
    return _save(GitForCausalLM, config, GitProcessor(image, tokenizer), folder, seed, True)


def vision_encoder_decoder(folder: Path, *, seed: int = 0) -> Path:
    """TrOCR's kind: ViT, a projection, a decoder with RoBERTa's tokenizer."""
    from transformers import (
        TrOCRConfig,
        TrOCRProcessor,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    tokenizer = _bart_like()
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
             "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.eos_token_id}  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56,
                  patch_size=14, initializer_range=INIT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        TrOCRConfig(vocab_size=len(tokenizer), d_model=40, decoder_layers=2, decoder_attention_heads=4,
                    decoder_ffn_dim=64, max_position_embeddings=512, dropout=0.0, init_std=INIT, **marks),
        **marks,
    )  # fmt: skip
    processor = TrOCRProcessor(ViTImageProcessor(size={"height": 56, "width": 56}, **INK), tokenizer)
    return _save(VisionEncoderDecoderModel, config, processor, folder, seed, True)


def idefics_patches(folder: Path, *, seed: int = 0) -> Path:
    """IDEFICS without its perceiver: the tower's patches themselves."""
    return idefics(folder, seed=seed, resampler=False)


def idefics(folder: Path, *, seed: int = 0, resampler: bool = True) -> Path:
    """IDEFICS: a perceiver's latents, of the vision tower's width, read through gated cross-attention layers."""
    from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessor, IdeficsProcessor

    tokenizer = _llama_like(640, ("<fake_token_around_image>", "<image>", "<end_of_utterance>"))
    config = IdeficsConfig(
        vocab_size=len(tokenizer), hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        cross_layer_interval=1, use_resampler=resampler, alpha_initializer="ones", initializer_range=INIT,
        freeze_text_layers=False, freeze_vision_layers=False, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        vision_config={"embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 56, "patch_size": 14, "initializer_range": INIT},
        perceiver_config={"use_resampler": resampler, "resampler_n_latents": 8, "resampler_depth": 1,
                          "resampler_n_heads": 4, "resampler_head_dim": 8},
    )  # fmt: skip
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=56, **INK), tokenizer)
    return _save(IdeficsForVisionText2Text, config, processor, folder, seed, True)


def instructblip(folder: Path, *, seed: int = 0) -> Path:
    """InstructBLIP with a Llama: query tokens that have read the question, in front of the begin mark."""
    from transformers import (
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    tokenizer, asking = _llama_like(), _bert_like()
    processor = InstructBlipProcessor(
        BlipImageProcessor(size={"height": 56, "width": 56}, **INK), tokenizer, asking, num_query_tokens=4
    )
    config = InstructBlipConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 56, "patch_size": 14, "initializer_range": INIT},
        qformer_config={"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "encoder_hidden_size": 32, "vocab_size": len(asking), "initializer_range": INIT,
                        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 40, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
                     "max_position_embeddings": 512, "initializer_range": INIT},
        num_query_tokens=4, image_token_index=tokenizer.convert_tokens_to_ids("<image>"), initializer_range=INIT,
    )  # fmt: skip
    return _save(_awake(InstructBlipForConditionalGeneration), config, processor, folder, seed, True)


def kosmos2_5(folder: Path, *, seed: int = 0) -> Path:
    """Kosmos-2.5: Pix2Struct's patches, latent queries in a marked run of the text."""
    from transformers import (
        Kosmos2_5Config,
        Kosmos2_5ForConditionalGeneration,
        Kosmos2_5ImageProcessor,
        Kosmos2_5Processor,
    )

    tokenizer = _llama_like(
        640, ("<image>", "</image>", "<md>"),
        extra_special_tokens={"boi_token": "<image>", "eoi_token": "</image>", "image_token": "<s>"},
    )  # fmt: skip
    config = Kosmos2_5Config(
        text_config={"vocab_size": len(tokenizer), "embed_dim": 40, "layers": 2, "ffn_dim": 64, "attention_heads": 4,
                     "max_position_embeddings": 512, "dropout": 0.0, "attention_dropout": 0.0, "init_std": INIT,
                     "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id},
        vision_config={"hidden_size": 32, "patch_embed_hidden_size": 192, "intermediate_size": 64, "head_dim": 8,
                       "num_hidden_layers": 2, "num_attention_heads": 4, "max_num_patches": 64, "patch_size": 8,
                       "initializer_range": INIT},
        latent_query_num=8,
    )  # fmt: skip
    processor = Kosmos2_5Processor(
        Kosmos2_5ImageProcessor(max_patches=40, patch_size={"height": 8, "width": 8}), tokenizer, num_image_tokens=8
    )
    return _save(Kosmos2_5ForConditionalGeneration, config, processor, folder, seed, True)


def t5gemma2(folder: Path, *, seed: int = 0) -> Path:
    """T5Gemma 2: Gemma 3's pooled SigLIP tokens in the encoder's text, answers from a decoder."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor, T5Gemma2Config, T5Gemma2ForConditionalGeneration

    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ["<pad>", "<eos>", "<bos>", *tokens.values()]
    tokenizer = metaspace_tokenizer(
        640, special, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=tokens
    )
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16,
        "bos_token_id": ids("<bos>"), "eos_token_id": ids("<eos>"), "pad_token_id": ids("<pad>"),
        "initializer_range": INIT,
    }  # fmt: skip
    config = T5Gemma2Config(
        encoder={
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                              "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 112, "patch_size": 14},
            "mm_tokens_per_image": 16, "boi_token_index": ids("<start_of_image>"),
            "eoi_token_index": ids("<end_of_image>"), "image_token_index": ids("<image_soft_token>"),
            "initializer_range": INIT,
        },
        decoder=text, image_token_index=ids("<image_soft_token>"), eoi_token_index=ids("<end_of_image>"),
        initializer_range=INIT,
    )  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 112, "width": 112}, **INK), tokenizer, image_seq_length=16
    )
    return _save(_awake(T5Gemma2ForConditionalGeneration), config, processor, folder, seed, True)


def vision_encoder_decoder_swin(folder: Path, *, seed: int = 0) -> Path:
    """Donut's kind: a Swin tower of the decoder's width, questions behind the decoder's begin mark."""
    from transformers import (
        DonutImageProcessor,
        DonutProcessor,
        DonutSwinConfig,
        MBartConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
    )

    tokenizer = _bart_like()
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
             "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.bos_token_id}  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        DonutSwinConfig(image_size=[48, 64], patch_size=4, embed_dim=20, depths=[1, 1], num_heads=[2, 4], window_size=4,
                        initializer_range=INIT, drop_path_rate=0.0),
        MBartConfig(vocab_size=len(tokenizer), d_model=40, decoder_layers=2, decoder_attention_heads=4,
                    decoder_ffn_dim=64, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64,
                    max_position_embeddings=512, dropout=0.0, init_std=INIT, is_decoder=True, add_cross_attention=True,
                    is_encoder_decoder=False, **marks),
        **marks,
    )  # fmt: skip
    processor = DonutProcessor(
        DonutImageProcessor(size={"height": 48, "width": 64}, do_thumbnail=True, do_align_long_axis=False, **INK),
        tokenizer,
    )
    return _save(VisionEncoderDecoderModel, config, processor, folder, seed, True)


def _persimmon_like() -> PreTrainedTokenizerFast:
    """Sentence pieces that put their underscore before every text, placeholders included, as Fuyu's processor expects.

    Placeholders are ordinary pieces, hence chosen by score.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    from tests.tiny import CORPUS

    marks = ["<s>", "</s>", "|SPEAKER|", "|NEWLINE|", "<0x04>"]
    words = sorted({"▁" + word for line in CORPUS for word in line.split()})
    characters = sorted(
        {character for line in CORPUS for character in line} | {"▁", "\n"} | set("abcdefghijklmnopqrstuvwxyz")
    )
    pieces = [("<unk>", -20.0), *((mark, 0.0) for mark in marks), *((word, -5.0) for word in words)]
    pieces += [(character, -10.0) for character in characters if character != " "]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", padding_side="right")


def fuyu(folder: Path, *, seed: int = 0) -> Path:
    """Fuyu: patches enter the language model as they are; its processor writes them before the question."""
    from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor

    tokenizer = _persimmon_like()
    ids = tokenizer.convert_tokens_to_ids
    config = FuyuConfig(
        text_config={"model_type": "persimmon", "vocab_size": len(tokenizer), "hidden_size": 48,
                     "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "max_position_embeddings": 512, "initializer_range": INIT, "bos_token_id": ids("<s>"),
                     "eos_token_id": ids("</s>")},
        patch_size=14, image_size=56, image_token_id=ids("|SPEAKER|"), initializer_range=INIT,
    )  # fmt: skip
    processor = FuyuProcessor(
        FuyuImageProcessor(size={"height": 56, "width": 84}, patch_size={"height": 14, "width": 14}, **INK), tokenizer
    )
    return _save(FuyuForCausalLM, config, processor, folder, seed, True)


BUILDERS = {
    "blip": blip,
    "blip-2": blip2,
    "florence2": florence2,
    "fuyu": fuyu,
    "git": git,
    "idefics": idefics,
    "instructblip": instructblip,
    "kosmos-2": kosmos2,
    "kosmos-2.5": kosmos2_5,
    "mllama": mllama,
    "pix2struct": pix2struct,
    "t5gemma2": t5gemma2,
    "vision-encoder-decoder": vision_encoder_decoder,
}
VARIANTS = {
    "blip-2 on T5": blip2_t5,
    "idefics, no perceiver": idefics_patches,
    "vision-encoder-decoder, Swin": vision_encoder_decoder_swin,
}

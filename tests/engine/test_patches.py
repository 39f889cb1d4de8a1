"""Images in prompts: their patch tokens enter as what the encoder made of them, whatever else happens meanwhile."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
import pytest
import torch
import transformers
from torch import Tensor

from engine.image_spec import ImageSpec
from engine.images import choose_grid, image_tokens
from engine.patches import PromptPatches
from engine.prefix_cache import extend_hashes
from engine.request import PromptImage, Request, RequestRejected, SamplingParams
from engine.tiles import to_tiles
from llama4.vision_config import VisionConfig
from llama4.weights import Checkpoint, load_vision
from tests.single import SingleProcess

PATCH, SEPARATOR, START, END = 95, 94, 93, 92
WIDTH = 32
TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
TIGHT = 22  # pages
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, logprobs=0)


@dataclass(frozen=True)
class Prompt:
    """A request and the embeddings of its images, [patches, WIDTH] each."""

    request: Request
    embeddings: tuple[Tensor, ...]
    patch_token_id: int = PATCH

    @property
    def patches(self) -> PromptPatches:
        return PromptPatches(self.request, self.embeddings, self.patch_token_id)


def picture(digest: bytes, patches: int) -> Tensor:
    """What the encoder makes of the image of that digest."""
    return torch.randn((patches, WIDTH), generator=torch.Generator().manual_seed(digest[0]))


def make_prompt(name: str, pieces: Sequence[int | bytes], rng: random.Random, **fields: object) -> Prompt:
    """`pieces`: a number of text tokens, or an image's digest; an image has 7 to 13 tokens, as its digest says.

    The text's tokens are the patch token's too: it means something inside of images only.
    """
    tokens: list[int] = []
    images: list[PromptImage] = []
    embeddings: list[Tensor] = []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += [rng.choice((PATCH, *range(92))) for _ in range(piece)]
            continue
        count = 2 + piece[0] % 4
        layout = [START, *[PATCH] * count, SEPARATOR, *[PATCH] * count, END]
        images.append(PromptImage(len(tokens), len(layout), piece))
        embeddings.append(picture(piece, 2 * count))
        tokens += layout
    return Prompt(Request(name, tuple(tokens), GREEDY, images=tuple(images), **fields), tuple(embeddings))


def digest(number: int) -> bytes:
    return number.to_bytes(1) * 16


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    cached: int

    def check(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        assert self.tokens == list(tokens)
        assert self.logprobs == pytest.approx(list(logprobs), abs=2e-3)


def run(single: SingleProcess, prompts: Sequence[Prompt]) -> dict[str, Answer]:
    for prompt in prompts:
        single.engine.submit(prompt.request, patches=prompt.patches)
    single.wait([prompt.request.request_id for prompt in prompts])
    answers = {}
    for prompt in prompts:
        outputs = single.outputs[prompt.request.request_id]
        entries = [entry for output in outputs for entry in output.logprobs]
        answers[prompt.request.request_id] = Answer(
            [entry.token_id for entry in entries], [entry.logprob for entry in entries], outputs[0].cached_tokens
        )
    return answers


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    rng = random.Random(4)
    shapes: list[list[int | bytes]] = [
        [3, digest(1), 4],
        [digest(2), 1],  # an image first
        [12, digest(3), digest(1), 2, digest(3), 3],  # one after another, and one twice
        [20, digest(4)],  # an image last: the first token is its last row's
        [5, digest(5), 30, digest(6), 9],
    ]
    return [make_prompt(f"prompt-{n}", shape, rng) for n, shape in enumerate(shapes)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, asked: list[Prompt]) -> Mapping[str, tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities by transformers, which gets the rows' vectors instead of tokens."""
    model = transformers.Llama4ForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    answers = {}
    for prompt in asked:
        request = prompt.request
        with torch.no_grad():
            h_TD = model.get_input_embeddings()(torch.tensor(request.prompt_token_ids))
            for image, rows in zip(request.images, prompt.embeddings, strict=True):
                places = [at for at in range(image.start, image.stop) if request.prompt_token_ids[at] == PATCH]
                h_TD[places] = rows
            tokens, logprobs = [], []
            for _ in range(GREEDY.max_tokens):
                scores = model(inputs_embeds=h_TD[None], use_cache=False).logits[0, -1].log_softmax(-1)
                tokens.append(int(scores.argmax()))
                logprobs.append(float(scores.max()))
                h_TD = torch.cat([h_TD, model.get_input_embeddings()(torch.tensor(tokens[-1:]))])
        answers[request.request_id] = tokens, logprobs
    return answers


@pytest.mark.parametrize(
    ("page_size", "batch", "pages"), [(4, 24, 128), (5, 7, 128), (16, 256, 32), (4, 16, TIGHT)], ids=str
)
def test_answers_are_those_of_transformers(checkpoint, asked, expected, page_size, batch, pages):
    """With whole prefills, with prefills cut inside of images, and (few pages) with preemption."""
    single = SingleProcess(checkpoint, page_size=page_size, pages=pages, max_batch_tokens=batch)
    try:
        answers = run(single, asked)
        assert (single.scheduler.preemptions > 0) == (pages == TIGHT)
        for name, answer in answers.items():
            answer.check(*expected[name])
        # Again, through the prefix cache; and from the middle, as after another engine's death.
        for name, answer in run(single, [_renamed(prompt, "again") for prompt in asked]).items():
            answer.check(*expected[name.removesuffix("-again")])
        resumed = [
            Prompt(replace(prompt.request, request_id=f"{prompt.request.request_id}-{salt}-moved", cache_salt=salt,
                           generated_token_ids=tuple(expected[prompt.request.request_id][0][:3])), prompt.embeddings)
            for prompt in asked for salt in ("", "salt")
        ]  # fmt: skip
        for name, answer in run(single, resumed).items():
            tokens, logprobs = expected[name.rsplit("-", 2)[0]]
            answer.check(tokens[3:], logprobs[3:])
    finally:
        single.close()


def _renamed(prompt: Prompt, suffix: str) -> Prompt:
    return replace(prompt, request=replace(prompt.request, request_id=f"{prompt.request.request_id}-{suffix}"))


def test_the_same_image_is_found_again_and_another_is_not(engine):
    """Pages of 4, chunks of 12: 14 tokens of text, an image, 9 tokens of text."""
    first = make_prompt("first", [14, digest(0x11), 9], random.Random(1))
    same = _renamed(first, "same")
    other_images = (replace(first.request.images[0], digest=digest(0x15)),)
    other = Prompt(replace(first.request, request_id="other", images=other_images), (picture(digest(0x15), 6),))
    fresh = Prompt(replace(other.request, request_id="fresh", cache_salt="fresh"), other.embeddings)
    answers = {}
    for prompt in (first, same, other, fresh):
        answers |= run(engine, [prompt])
    length = len(first.request.prompt_token_ids)
    assert answers["first"].cached == answers["fresh"].cached == 0
    assert answers["first-same"].cached == (length - 1) // 4 * 4
    assert answers["other"].cached == 12  # the image begins in the page behind these
    answers["first-same"].check(answers["first"].tokens, answers["first"].logprobs)
    answers["other"].check(answers["fresh"].tokens, answers["fresh"].logprobs)
    assert answers["other"].logprobs != pytest.approx(answers["first"].logprobs, abs=1e-2)


def test_hashes_cover_the_image_and_its_place():
    def pages(*images: PromptImage) -> list[bytes]:
        found: list[bytes] = []
        extend_hashes(found, [7] * 16, 4, "", images)
        return found

    text = pages()
    image = pages(PromptImage(5, 6, digest(1)))
    assert [a == b for a, b in zip(text, image, strict=True)] == [True, False, False, False]
    assert pages(PromptImage(5, 6, digest(2)))[1] != image[1]
    assert pages(PromptImage(4, 7, digest(1)))[1] != image[1] != pages(PromptImage(6, 5, digest(1)))[1]
    assert pages(PromptImage(5, 7, digest(1)))[1] == image[1]  # what follows the page does not matter to it
    assert pages(PromptImage(5, 3, digest(1)), PromptImage(8, 3, digest(1)))[1:3] != image[1:3]
    assert image[1].hex() == "aacdbef5a7f4e00fcbfbba5be372d31c"


def test_images_of_the_bundled_model_become_the_same_answer_as_in_transformers():
    """From pixels to tokens: two images of several tiles and of one, with text between."""
    spec, config = ImageSpec.from_dir(TINY), VisionConfig.from_dir(TINY)
    assert spec is not None and config is not None
    encoder = load_vision(Checkpoint(TINY), config, torch.float32, "cpu")
    pictures = [
        PIL.Image.effect_mandelbrot(size, (-2, -1.2, 1, 1.2), 40).convert("RGB") for size in ((150, 100), (56, 50))
    ]
    tiles = [torch.from_numpy(to_tiles(picture, spec)) for picture in pictures]
    tokens, places = [*b"See ", 261], []
    for number, picture in enumerate(pictures):
        stand_in = image_tokens(choose_grid(picture.width, picture.height, spec), spec)
        places.append(PromptImage(len(tokens), len(stand_in), digest(number)))
        tokens += [*stand_in, *b" and "]
    request = Request("picture", tuple(tokens), GREEDY, images=tuple(places))
    prompt = Prompt(request, tuple(encoder(each).flatten(0, 1) for each in tiles), spec.patch_token_id)

    model = transformers.Llama4ForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    )
    expected = []
    with torch.no_grad():
        for _ in range(GREEDY.max_tokens):
            ids = torch.tensor([[*tokens, *expected]])
            logits = model(input_ids=ids, pixel_values=torch.cat(tiles), use_cache=False).logits[0, -1]
            expected.append(int(logits.argmax()))
    single = SingleProcess(TINY, max_batch_tokens=40)
    try:
        assert run(single, [prompt])["picture"].tokens == expected
    finally:
        single.close()


def test_embeddings_are_let_go_when_their_request_ends(engine):
    prompt = make_prompt("finished", [3, digest(1), 4], random.Random(1))
    aborted = make_prompt("aborted", [3, digest(2), 4], random.Random(1))
    endless = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    aborted = replace(aborted, request=replace(aborted.request, params=endless))
    patches = [prompt.patches, aborted.patches]
    kept = [weakref.ref(one) for one in patches]
    engine.engine.submit(aborted.request, patches=patches.pop())
    engine.engine.submit(prompt.request, patches=patches.pop())
    engine.wait(["finished"])
    assert engine.engine.abort(["aborted"]) == 1
    engine.wait(["aborted"])
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_rows_have_to_fit_the_patch_tokens():
    prompt = make_prompt("one", [3, digest(1), digest(2), 2], random.Random(1))
    first, second = prompt.embeddings
    with pytest.raises(RequestRejected, match="image 2 has 8 patch tokens and 7 embeddings") as caught:
        PromptPatches(prompt.request, (first, second[1:]), PATCH)
    assert caught.value.field == "messages"
    with pytest.raises(RequestRejected, match="2 images have embeddings for 1"):
        PromptPatches(prompt.request, (first,), PATCH)

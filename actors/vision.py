"""The image encoder as a Ray Serve deployment of its own, which scales by its own load.

A replica decodes images, cuts them into tiles, encodes the tiles of several images together and puts the embeddings
into Ray's object store. Its answers say where they are: the data goes from there to the attention actors.

Shapes: N tiles of an image, C colours, H and W a tile's sides, M tokens of a tile, P patch tokens of an image, D the
text model's width.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import ray
import torch
from torch import Tensor

from actors import series
from actors.current_span import start_tracing
from actors.embeddings import to_array
from actors.encoded_images import EncodedImage, EncodedImages
from actors.garbage import keep_all_there_is
from actors.giving_way import give_way
from actors.logs import set_up_logs
from actors.ray_metrics import RayMetrics
from actors.tile_batcher import TileBatcher, Tiles
from actors.vision_app import NAME
from cluster.config import DeploymentConfig
from engine.image_spec import ImageSpec
from engine.images import ImageError, ImageLimits, read_image
from engine.request import RequestRejected
from engine.tiles import to_tiles
from llama4.precision import choose_dtype
from llama4.vision_config import VisionConfig
from llama4.weights import Checkpoint, load_vision

log = logging.getLogger("herder")

_DECODERS = 2  # threads that decode and tile: the next images, while the encoder has those before them


class Vision:
    """One replica."""

    def __init__(self, config: DeploymentConfig) -> None:
        """Loads the encoder. Raises CheckpointError."""
        set_up_logs(config.log_level, config.log_format)
        path, vision = config.model.path, config.vision
        spec, encoder_config = ImageSpec.from_dir(path), VisionConfig.from_dir(path)
        assert spec is not None and encoder_config is not None, "deployed for checkpoints that take images only"
        self._spec = spec
        self._limits = ImageLimits(vision.max_image_bytes, vision.max_image_pixels)
        self._device = torch.device(vision.device)
        dtype = choose_dtype(self._device, config.model.dtype)
        self._encoder = load_vision(Checkpoint(path), encoder_config, dtype, self._device)
        self._decoding = ThreadPoolExecutor(_DECODERS, "decode", _begin_thread, (1,))
        encoding = ThreadPoolExecutor(1, "encode", _begin_thread, (vision.compute_threads,))
        self._batcher = TileBatcher(self._encode_tiles, vision.max_batch_tiles, encoding)
        self._decoded = asyncio.Semaphore(vision.max_batch_tiles)  # what waits is the files: tiles are large
        self._cache = EncodedImages(vision.cache_bytes)
        self._under_way: dict[bytes, asyncio.Task[EncodedImage]] = {}
        self._tracing = start_tracing(config.tracing, NAME)
        self._metrics = RayMetrics()
        self._metrics.set(series.IMAGES_RUNNING, 0)
        for counted in (series.IMAGES, series.IMAGE_HITS, series.TILES):
            self._metrics.add(counted, 0)
        keep_all_there_is()
        log.info("vision up device=%s dtype=%s tile=%d", self._device, dtype, spec.tile_size)

    async def encode(
        self, digest: bytes, data: bytes, traceparent: str | None = None
    ) -> EncodedImage | RequestRejected:
        """Where the embeddings of an encoded file with that digest are; or why it cannot be read.

        `traceparent`: W3C's Trace Context of the span that this is a part of, if the request is traced.
        """
        tracing = self._tracing
        with nullcontext() if tracing is None else tracing.continued("encode image", traceparent) as span:
            if span is not None:
                span.set_attribute("herder.cached", self._cache.get(digest) is not None)
            return await self._answer(digest, data)

    async def _answer(self, digest: bytes, data: bytes) -> EncodedImage | RequestRejected:
        if (known := self._cache.get(digest)) is not None:
            self._metrics.add(series.IMAGE_HITS, 1)
            return known
        if (task := self._under_way.get(digest)) is None:
            task = self._under_way[digest] = asyncio.create_task(self._encode(digest, data))
            task.add_done_callback(lambda _: self._end(digest))
            self._metrics.set(series.IMAGES_RUNNING, len(self._under_way))
        else:
            self._metrics.add(series.IMAGE_HITS, 1)
        try:
            return await asyncio.shield(task)  # a client that goes away takes nothing from others that ask for the same
        except ImageError as error:
            return RequestRejected(str(error), field="messages")

    async def _encode(self, digest: bytes, data: bytes) -> EncodedImage:
        loop = asyncio.get_running_loop()
        async with self._decoded:
            tiles_NCHW = await loop.run_in_executor(self._decoding, self._read, data)
            embeddings_NMD = await self._batcher.encode(tiles_NCHW)
        image = await loop.run_in_executor(self._decoding, _store, embeddings_NMD.flatten(0, 1))
        self._cache.put(digest, image)
        self._metrics.add(series.IMAGES, 1)
        self._metrics.add(series.TILES, len(tiles_NCHW))
        return image

    def _end(self, digest: bytes) -> None:
        del self._under_way[digest]
        self._metrics.set(series.IMAGES_RUNNING, len(self._under_way))

    def _read(self, data: bytes) -> Tiles:
        return to_tiles(read_image(data, self._limits), self._spec)

    @torch.inference_mode()
    def _encode_tiles(self, tiles_NCHW: Tiles) -> Tensor:
        started = time.monotonic()
        embeddings_NMD: Tensor = self._encoder(torch.from_numpy(tiles_NCHW).to(self._device)).cpu()
        self._metrics.observe(series.ENCODE_SECONDS, time.monotonic() - started)
        return embeddings_NMD


def _begin_thread(threads: int) -> None:
    """A stream waits for attention and experts at every token, for its images once: beside them, this gives way."""
    give_way()
    torch.set_num_threads(threads)


def _store(embeddings_PD: Tensor) -> EncodedImage:
    array_PD = to_array(embeddings_PD)
    return EncodedImage(ray.put(array_PD), array_PD.nbytes)

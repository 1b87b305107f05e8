"""The HTTP interface of a recognizer, on FastAPI; without a network, so that it can be tested in one process.

Requests bring images as a plain body (image/jpeg, image/png, application/octet-stream), as files of
multipart/form-data, or as base64 in JSON. Whatever is wrong with a request is told as {"error": one line}, and of an
error of ours only that there was one. Nothing of a request is written to a disk but a person's name and embeddings.
"""

# no `from __future__ import annotations`: FastAPI reads the annotations of functions that are defined in a function

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional
from urllib.parse import urlsplit

import numpy as np

from deploy.alignment import align_faces
from deploy.backends import OnnxRecognizer, load_recognizer
from deploy.batching import Batcher, Busy
from deploy.detection import Faces, open_detector
from deploy.gallery import Gallery, open_gallery, similarity_threshold
from deploy.metrics import Metrics
from deploy.photos import decode_photo
from runtime.errors import DamagedItem, GalleryError, ModelError

log = logging.getLogger(__name__)

NEEDS = "serving needs more packages: pip install -r requirements-serve.txt"
WIRE = "/FaceClassifyService/inference"  # the seed's address
OPEN = ("/healthz", "/readyz", "/", "/docs", "/openapi.json")  # without a token; none tells anything of anybody
ROUTES = (WIRE, "/v1/embed", "/v1/verify", "/v1/search", "/v1/gallery", "/metrics", *OPEN)


@dataclass
class Settings:
    """What a server is started with; sizes in bytes, pixels and seconds."""

    model: str = ""
    device: Optional[str] = None
    threads: int = 1
    det_model: str = ""
    det_thresh: float = 0.6
    detect: bool = True
    gallery: str = ""
    storage: str = "fp32"
    threshold: Optional[float] = None
    token: str = ""
    max_body: int = 16 << 20
    max_pixels: int = 4096 * 4096
    max_images: int = 64
    max_faces: int = 1024
    timeout: float = 30.0  # for a body to come, and for the answer after that
    batch: int = 16  # with more, whole crowds of clients wait for one batch, and the model for them


class Refused(Exception):
    """An answer other than 200: its status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Engine:
    """The model, the detector and the gallery of one process, and the threads they run on."""

    def __init__(self, settings: Settings, metrics: Optional[Metrics] = None):
        self.settings, self.metrics = settings, metrics or Metrics(list(ROUTES))
        path, self.recognizer = load_recognizer(settings.model, settings.device, settings.threads)
        self.name, self.fingerprint = path.name, self.recognizer.fingerprint
        self.size = getattr(self.recognizer, "size", 112)
        blank_NSS3 = np.zeros((1, self.size, self.size, 3), np.uint8)
        self.dimension = self.recognizer.embed(blank_NSS3).shape[1]  # and warms up
        self.detector = self._detector()
        self.gallery: Optional[Gallery] = self._gallery() if settings.gallery else None
        self.threshold = settings.threshold
        for known in (getattr(self.gallery, "threshold", None), self.recognizer.threshold):
            self.threshold = known if self.threshold is None else self.threshold
        self.batcher: Optional[Batcher] = None
        if isinstance(self.recognizer, OnnxRecognizer):
            # One face a core: that is as quick as any batch, and a request stays on the thread that decodes it. One
            # that is alone in this process takes all of its cores.
            self.compute, self._counting, self._running = self._embed_now, threading.Lock(), 0
            self.on_one_core = OnnxRecognizer(path, 1) if settings.threads > 1 else self.recognizer
            self.on_one_core.embed(blank_NSS3)
        else:
            self.batcher = Batcher(self.recognizer.embed, settings.batch, observe=self.metrics.batch)
            self.compute = self.batcher.submit
        # decoding, detection and onnxruntime release Python's lock; the gallery's database is used by one thread
        self.workers = ThreadPoolExecutor(max(settings.threads, 2), "work")
        self.one_by_one = ThreadPoolExecutor(1, "gallery")

    def _detector(self):
        if not self.settings.detect:
            return None
        try:
            return open_detector(self.settings.det_model, self.settings.det_thresh)
        except ModelError as error:
            if self.settings.det_model:
                raise
            log.warning("%s; until then only aligned faces are taken", error)
            return None

    def _gallery(self) -> Gallery:
        path = Path(self.settings.gallery)
        if not path.exists():
            with contextlib.suppress(GalleryError):  # another worker makes it this very moment
                Gallery.create(path, self.fingerprint, self.dimension, self.recognizer.threshold).close()
        return open_gallery(path, self.fingerprint, self.dimension, self.settings.storage)

    def close(self) -> None:
        self.workers.shutdown()
        if self.batcher is not None:
            self.batcher.close()
        self.one_by_one.shutdown()
        if self.gallery is not None:
            self.gallery.close()

    def faces(self, data: bytes, number: int, aligned: Optional[bool]) -> tuple[Faces, np.ndarray]:
        """What is in an encoded image, and its aligned faces [n, S, S, 3]. aligned: the image is a face; None decides
        by its size. Raises Refused."""
        try:
            image_HWC = decode_photo(data, self.settings.max_pixels)
        except DamagedItem as error:
            raise Refused(422, f"image {number}: {error}") from None
        is_face = image_HWC.shape[:2] == (self.size, self.size)
        if aligned or (aligned is None and is_face) or self.detector is None:
            if not is_face:
                raise Refused(
                    422,
                    f"image {number}: is {image_HWC.shape[1]}x{image_HWC.shape[0]}, an aligned face has "
                    f"{self.size}x{self.size}",
                )
            whole = np.array([[0, 0, self.size, self.size]], np.float32)
            return Faces(whole, np.ones(1, np.float32), np.zeros((1, 5, 2), np.float32)), image_HWC[None]
        found = self.detector.detect(image_HWC)
        found = found.rows(slice(self.settings.max_faces))
        return found, align_faces(image_HWC, found.points_N52, self.size)

    def _embed_now(self, crops_NSS3: np.ndarray) -> np.ndarray:
        with self._counting:
            self.metrics.batch(len(crops_NSS3))
            alone, self._running = not self._running, self._running + 1
        try:
            return (self.recognizer if alone else self.on_one_core).embed(crops_NSS3)
        finally:
            with self._counting:
                self._running -= 1

    def look(self, data: bytes, number: int, aligned: Optional[bool], only_largest: bool) -> tuple:
        """(Faces, unit embeddings [n, D], or a future of them) of an encoded image. Raises Refused, Busy."""
        faces, crops_NSS3 = self.faces(data, number, aligned)
        if only_largest:
            if not len(faces):
                raise Refused(422, f"image {number}: no face was found")
            row = [faces.largest()]
            faces, crops_NSS3 = faces.rows(row), crops_NSS3[row]
        if not len(faces):
            return faces, np.zeros((0, self.dimension), np.float32)
        return faces, self.compute(crops_NSS3)

    async def embed(self, images: list, aligned: Optional[bool], only_largest: bool = False) -> list:
        """(Faces, unit embeddings [n, D]) of each image. Raises Refused, Busy."""
        loop, results = asyncio.get_running_loop(), []
        jobs = (loop.run_in_executor(self.workers, self.look, data, i, aligned, only_largest)
                for i, data in enumerate(images))  # fmt: skip
        for faces, emb_ND in await asyncio.gather(*jobs):
            if isinstance(emb_ND, Future):
                emb_ND = await asyncio.wrap_future(emb_ND)
            if not np.isfinite(emb_ND).all():
                raise Refused(422, "the model gives no finite embedding for a face of this request")
            results.append((faces, emb_ND))
        return results

    async def with_gallery(self, function, *arguments):
        """One call at a time. Raises Refused."""
        if self.gallery is None:
            raise Refused(404, "there is no gallery: the server was started without --gallery")
        try:
            return await asyncio.get_running_loop().run_in_executor(self.one_by_one, function, *arguments)
        except GalleryError as error:
            raise Refused(422, str(error)) from None


def make_app(engine: Engine, on_ready=lambda: None):
    """The FastAPI application over a loaded engine, which it closes when it ends. Raises ModelError without FastAPI."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
    except ImportError:
        raise ModelError(NEEDS) from None
    settings, metrics = engine.settings, engine.metrics

    @contextlib.asynccontextmanager
    async def lifespan(_):
        on_ready()
        yield
        await asyncio.get_running_loop().run_in_executor(None, engine.close)

    app = FastAPI(
        title="Face recognition",
        version="1",
        description="Embeddings of faces, comparison of two photos, and a gallery of known people.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )

    def refuse(status: int, message: str, headers=None):
        return JSONResponse({"error": message}, status, headers)

    class Guard:
        """Around every request: token, origin, body and time limits, counters, and errors that tell nothing of us."""

        def __init__(self, inner):
            self.inner = inner

        async def __call__(self, scope, receive, send):
            if scope["type"] != "http":
                return await self.inner(scope, receive, send)
            began, status = time.perf_counter(), 500
            started = False

            async def counted_send(message):
                nonlocal status, started
                if message["type"] == "http.response.start":
                    status, started = message["status"], True
                await send(message)

            path = scope["path"]
            headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
            try:
                early = check(path, headers)
                if early is None:
                    await asyncio.wait_for(self.inner(scope, receive, counted_send), 2 * settings.timeout)
                else:
                    await early(scope, receive, counted_send)
            except (asyncio.TimeoutError, TimeoutError):
                if not started:
                    await refuse(504, "the request took too long")(scope, receive, counted_send)
            except Exception:
                log.exception("a request to %s failed", path if path in ROUTES else "an unknown address")
                if not started:
                    await refuse(500, "internal error")(scope, receive, counted_send)
            finally:
                metrics.request(path, status, time.perf_counter() - began)

    def check(path: str, headers: dict):
        """The answer to a request that is not let in; else None."""
        origin = headers.get("origin", "")
        if origin and origin != "null" and urlsplit_host(origin) != headers.get("host", ""):
            return refuse(403, "requests of other web sites are not answered")
        if settings.token and path not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), settings.token.encode()):
                return refuse(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        return None

    @app.exception_handler(Refused)
    async def refused(_, error):
        return refuse(error.status, str(error))

    @app.exception_handler(Busy)
    async def busy(_, error):
        return refuse(503, str(error), {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def no_such(request, error):
        headers = error.headers
        if error.status_code == 405:  # of the framework, which names the methods of one function alone
            here = [route.methods for route in app.routes if getattr(route, "path", "") == request.url.path]
            headers = {"Allow": ", ".join(sorted(set().union(*here)))}
        return refuse(error.status_code, str(error.detail), headers)

    async def read_body(request) -> bytes:
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > settings.max_body:
            raise Refused(413, f"a body has at most {settings.max_body} bytes")
        body = bytearray()

        async def collect():
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > settings.max_body:
                    raise Refused(413, f"a body has at most {settings.max_body} bytes")

        try:
            await asyncio.wait_for(collect(), settings.timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise Refused(408, "the body did not come in time") from None
        except ClientDisconnect:
            raise Refused(400, "the body did not come") from None
        return bytes(body)

    async def images_of(request, key: str = "images") -> list:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await read_body(request)
        if kind == "application/json":
            images = json_images(body, key)
        elif kind == "multipart/form-data":
            images = multipart_images(request.headers["content-type"], body)
        elif kind.startswith("image/") or kind == "application/octet-stream":
            images = [body]
        else:
            raise Refused(415, "images come as image/*, application/octet-stream, multipart/form-data or JSON")
        if not images:
            raise Refused(400, "no image in the request")
        if len(images) > settings.max_images:
            raise Refused(413, f"at most {settings.max_images} images a request")
        return images

    def flag(request, name: str) -> Optional[bool]:
        text = request.query_params.get(name)
        if text is None:
            return None
        if text not in ("true", "false"):
            raise Refused(400, f"{name} is true or false")
        return text == "true"

    # --- the seed's interface ---

    @app.post(
        WIRE, openapi_extra=documented("Embeddings, in the wire format of PLSC's client", "base64_string", least=0)
    )
    async def inference(request: Request):
        images = json_images(await read_body(request), "base64_string")
        if len(images) > settings.max_images:
            raise Refused(413, f"at most {settings.max_images} images a request")
        if not images:
            return JSONResponse({"instance": []})
        results = await engine.embed(images, None, only_largest=True)
        return JSONResponse({"instance": [{"embedding": plain(emb_1D[0])} for _, emb_1D in results]})

    # --- ours ---

    @app.post("/v1/embed", openapi_extra=documented("Faces of each image and their embeddings", "images", aligned=True))
    async def embed(request: Request):
        results = await engine.embed(await images_of(request), flag(request, "aligned"))
        images = [{"faces": [{**face, "embedding": plain(emb_D)} for face, emb_D in zip(shown(faces), emb_ND)]}
                  for faces, emb_ND in results]  # fmt: skip
        return JSONResponse({"model": engine.fingerprint, "dimension": engine.dimension, "images": images})

    @app.post(
        "/v1/verify", openapi_extra=documented("Do two photos show one person", "images", aligned=True, least=2, most=2)
    )
    async def verify(request: Request):
        images = await images_of(request)
        if len(images) != 2:
            raise Refused(400, f"two images are compared, the request has {len(images)}")
        (one, emb_1D), (two, other_1D) = await engine.embed(images, flag(request, "aligned"), only_largest=True)
        similarity = float(emb_1D[0].astype(np.float64) @ other_1D[0])
        threshold = engine.threshold
        return JSONResponse(
            {
                "same": None if threshold is None else 2 - 2 * similarity < threshold,
                "similarity": round(similarity, 6),
                "distance": round(2 - 2 * similarity, 6),
                "threshold": threshold,
                "faces": [shown(one)[0], shown(two)[0]],
            }
        )

    @app.post(
        "/v1/search", openapi_extra=documented("The nearest people of the gallery", "images", aligned=True, count=True)
    )
    async def search(request: Request):
        images, count = await images_of(request), request.query_params.get("count", "5")
        if not re.fullmatch(r"[0-9]{1,3}", count) or not 1 <= int(count) <= 100:
            raise Refused(400, "count is a number from 1 to 100")
        if engine.gallery is None:
            await engine.with_gallery(None)
        results = await engine.embed(images, flag(request, "aligned"))
        threshold, answer = engine.threshold, []
        least = None if threshold is None else similarity_threshold(threshold)
        for faces, emb_ND in results:
            found = await engine.with_gallery(engine.gallery.search, emb_ND, int(count)) if len(emb_ND) else []
            people = []
            for face, near in zip(shown(faces), found):
                known = bool(near) and (least is None or near[0].similarity > least)
                listed = [{"name": match.name, "similarity": round(match.similarity, 6)} for match in near]
                people.append({**face, "name": near[0].name if known else None, "candidates": listed})
            answer.append({"faces": people})
        return JSONResponse({"threshold": threshold, "images": answer})

    @app.get("/v1/gallery", openapi_extra=documented("Who is in the gallery"))
    async def people(request: Request):
        return JSONResponse({"people": await engine.with_gallery(lambda: engine.gallery.people())})

    @app.post("/v1/gallery", openapi_extra=documented("Photos of one person", "images", aligned=True, name=True))
    async def add(request: Request):
        images, name = await images_of(request), request.query_params.get("name", "")
        if engine.gallery is None:
            await engine.with_gallery(None)
        results = await engine.embed(images, flag(request, "aligned"), only_largest=True)
        emb_ND = np.concatenate([emb_1D for _, emb_1D in results])

        def store():
            known = name.strip() in engine.gallery.people()
            near = engine.gallery.search(emb_ND, 1)
            engine.gallery.add(name, emb_ND)
            threshold = engine.threshold
            if not known or threshold is None:
                return None
            least = similarity_threshold(threshold)
            alike = [match for row in near for match in row if match.similarity > least and match.name == name.strip()]
            return None if alike else "the name was known and these faces do not look like it: two people, one name?"

        warning = await engine.with_gallery(store)
        return JSONResponse({"name": name.strip(), "added": len(emb_ND), "warning": warning})

    @app.delete("/v1/gallery", openapi_extra=documented("Forgets a person", name=True))
    async def remove(request: Request):
        name = request.query_params.get("name", "")
        gone = await engine.with_gallery(lambda: engine.gallery.remove(name))
        if not gone:
            raise Refused(404, "nobody of that name is in the gallery")
        return JSONResponse({"name": name, "removed": gone})

    @app.get("/healthz", openapi_extra=documented("The process lives"))
    async def healthz(request: Request):
        return JSONResponse({"alive": True})

    @app.get("/readyz", openapi_extra=documented("Requests are taken"))
    async def readyz(request: Request):
        return JSONResponse({"model": engine.name, "fingerprint": engine.fingerprint})

    @app.get("/metrics", openapi_extra=documented("Counters for Prometheus", text=True))
    async def counters(request: Request):
        return PlainTextResponse(metrics.text())

    page = (Path(__file__).parent / "page.html").read_bytes()

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def web_page(request: Request):
        return HTMLResponse(page, headers={"Content-Security-Policy": policy(page)})

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon(request: Request):
        return Response(status_code=204)

    app.add_middleware(Guard)
    return app


def uvicorn_config(app, settings: Settings, **more):
    """uvicorn's, over a protocol that also hangs up on those who do not finish a request's head in time."""
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Impatient(AutoHTTPProtocol):
        _timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._watch()

        def data_received(self, data):
            super().data_received(data)
            self._watch()

        def connection_lost(self, error):
            if self._timer:
                self._timer.cancel()
            super().connection_lost(error)

        def _in_head(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _watch(self):
            if self._timer and not self._in_head():
                self._timer.cancel()
                self._timer = None
            elif self._timer is None and self._in_head():
                self._timer = self.loop.call_later(settings.timeout, self._hang_up)

        def _hang_up(self):
            self._timer = None
            if self._in_head():
                self.transport.close()

    options = {"lifespan": "on", "log_config": None, "access_log": False, "server_header": False, "http": Impatient}
    return uvicorn.Config(app, **{**options, **more})


def urlsplit_host(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return "?"


def json_images(body: bytes, key: str) -> list:
    """The images of {key: [base64, ...]}. Raises Refused."""
    try:
        texts = json.loads(body)[key]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(400, f'the body is not {{"{key}": [base64 text, ...]}}') from None
    try:
        return [base64.b64decode(text, validate=True) for text in texts]
    except (binascii.Error, ValueError):
        raise Refused(400, f"{key} holds what is not base64") from None


def multipart_images(content_type: str, body: bytes) -> list:
    """The files of a multipart body, kept in memory. Raises Refused."""
    from python_multipart.multipart import create_form_parser

    images: list = []

    def take(file):
        file.file_object.seek(0)
        images.append(file.file_object.read())

    headers = {"Content-Type": content_type.encode("latin1")}
    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = create_form_parser(headers, lambda field: None, take, config=in_memory)
        parser.write(body)
        parser.finalize()
    except Exception:  # the parser's errors, and those of odd headers
        raise Refused(400, "the multipart body cannot be read") from None
    return images


def plain(emb_D: np.ndarray) -> list:
    """Numbers as JSON: float32 has no more digits."""
    return np.round(emb_D.astype(np.float64), 8).tolist()


def shown(faces: Faces) -> list:
    boxes, points = faces.boxes_N4.astype(float).round(1).tolist(), faces.points_N52.astype(float).round(1).tolist()
    return [
        {"box": box, "score": round(float(score), 4), "landmarks": five}
        for box, score, five in zip(boxes, faces.scores_N, points)
    ]


def policy(page: bytes) -> str:
    """The page runs its own script and nothing else."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.S)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def documented(
    summary: str, key: str = "", aligned=False, name=False, count=False, text=False, least=1, most=None
) -> dict:
    """An operation for the OpenAPI page, with every status that it can give; least, most: images of a request."""
    error = {"application/json": {"schema": {"type": "object", "required": ["error"],
                                             "properties": {"error": {"type": "string"}}}}}  # fmt: skip
    answer = (
        {"text/plain": {"schema": {"type": "string"}}} if text else {"application/json": {"schema": {"type": "object"}}}
    )
    reasons = {400: "malformed", 401: "no token", 403: "from another web site", 404: "not there",
               408: "not sent in time", 413: "too large", 415: "no known type of image",
               422: "cannot be done with this image or name", 503: "busy or not ready",
               504: "took too long"}  # fmt: skip
    responses = {"200": {"description": "done", "content": answer}}
    responses.update({str(status): {"description": why, "content": error} for status, why in reasons.items()})
    extra: dict = {"summary": summary, "responses": responses, "security": [{"bearer": []}, {}]}
    if key:
        count_of_images = {"minItems": least, **({"maxItems": most} if most else {})}
        base64_list = {"type": "object", "required": [key], "properties": {
            key: {"type": "array", "items": {"type": "string", "format": "byte"}, **count_of_images}}}  # fmt: skip
        content: dict = {"application/json": {"schema": base64_list}}
        if key == "images":
            files = {"type": "array", "items": {"type": "string", "format": "binary"}, **count_of_images}
            form = {"type": "object", "required": ["image"], "properties": {"image": files}}
            content["multipart/form-data"] = {"schema": form}
            for kind in ("image/jpeg", "image/png", "application/octet-stream"):
                if least < 2:
                    content[kind] = {"schema": {"type": "string", "format": "binary"}}
        extra["requestBody"] = {"required": True, "content": content}
    parameters = []
    if aligned:
        parameters.append(("aligned", False, {"type": "string", "enum": ["true", "false"]}))
    if count:
        parameters.append(("count", False, {"type": "integer", "minimum": 1, "maximum": 100}))
    if name:
        parameters.append(("name", True, {"type": "string", "minLength": 1, "maxLength": 200}))
    extra["parameters"] = [
        {"name": n, "in": "query", "required": required, "schema": schema} for n, required, schema in parameters
    ]
    return extra

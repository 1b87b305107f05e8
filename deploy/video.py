"""Frames of a video, and a video of frames, by PyAV (ffmpeg's libraries); optional: pip install av."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from runtime.errors import DamagedItem, ModelError

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")


class Frame(NamedTuple):
    """image_HWC: uint8 RGB; seconds: when it is shown."""

    image_HWC: np.ndarray
    seconds: float


def _av():
    try:
        import av
    except ImportError:
        raise ModelError("videos need PyAV: pip install av") from None
    return av


def _reason(error) -> str:
    return getattr(error, "strerror", None) or str(error)  # without the path


class VideoReader:
    """Iterates over the frames of a file's first video stream. Raises DamagedItem, which names no path.

    rate: frames a second, as the file says.
    """

    def __init__(self, path, max_pixels: int = 8192 * 8192):
        av = _av()
        try:
            self._container = av.open(str(path), mode="r", metadata_errors="ignore")
            stream = self._container.streams.video[0]
            self.rate: Fraction = stream.average_rate or stream.base_rate or Fraction(25)
            width, height = stream.codec_context.width, stream.codec_context.height
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DamagedItem(f"is no video that can be read ({_reason(error)})") from None
        except IndexError:
            raise DamagedItem("holds no video stream") from None
        if width * height > max_pixels:
            raise DamagedItem(f"claims frames of {width}x{height}; at most {max_pixels} pixels are decoded")
        self._errors = (av.FFmpegError, ValueError)

    def __iter__(self) -> Iterator[Frame]:
        count = 0
        try:
            for frame in self._container.decode(video=0):
                turns = round(getattr(frame, "rotation", 0) / 90) % 4  # phones film sideways and say so
                seconds = frame.time if frame.time is not None else float(count / self.rate)
                yield Frame(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)), seconds)
                count += 1
        except self._errors as error:
            if count == 0:
                raise DamagedItem(f"holds no frame that can be decoded ({_reason(error)})") from None
            raise DamagedItem(f"is damaged or cut off after {count} frames ({_reason(error)})") from None
        finally:
            self._container.close()
        if count == 0:
            raise DamagedItem("holds no frames")


class VideoWriter:
    """An mp4 file of frames of one size; H.264 where the size is even, else MPEG-4. Write to a temporary path: a file
    that was not closed is not whole."""

    def __init__(self, path: Path, rate: Fraction):
        self._container = _av().open(str(path), mode="w", format="mp4")
        self._rate, self._stream = Fraction(rate).limit_denominator(90000), None

    def write(self, image_HWC: np.ndarray, seconds: Optional[float] = None) -> None:
        """seconds: when the frame is shown; None gives it the next place of the constant rate."""
        av = _av()
        if self._stream is None:
            height, width = image_HWC.shape[:2]
            even = height % 2 == 0 and width % 2 == 0
            self._stream = self._container.add_stream("libx264" if even else "mpeg4", rate=self._rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            if not even:
                self._stream.codec_context.bit_rate = 8_000_000
            self._stream.codec_context.time_base = 1 / self._rate
            self._count = 0
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
        place = self._count if seconds is None else max(round(seconds * self._rate), self._count)
        frame.pts, frame.time_base = place, 1 / self._rate
        self._count = place + 1
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

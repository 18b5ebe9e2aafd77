"""Clips of audio and video, decoded when they are asked for.

What a video or sound in a sample becomes: an :class:`AVDecoder`, whose methods give frames and
sound of the times that are wanted, as tensors, or the whole. Names and results are those of
https://nvidia.github.io/Megatron-Energon/basic/data_decoding.html#av-decoder-audio-and-video, and a
clip is the same as that part of the whole, wherever in the file it lies: frames are chosen by the
time stamps of all frames, and sound is decoded from before the clip on, as it depends on what was
before.

PyAV does the decoding: ``pip install energon-fn[av]``.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from energon_fn.disk.media import AVMetadata, av_metadata, open_recording

Range = tuple[float, float]
Clips = tuple[list[torch.Tensor], list[Range]]
"""Clips, and for each the seconds at which it begins and ends."""

AV_OPTIONS = ("AVDecoder", "torch", "pyav", None)
"""What audio and video can become; see :func:`energon_fn.decoder`."""

RUN_UP = 1.0
"""Seconds of sound that are decoded before a clip: more than any decoder looks back."""


def decode_recording(data: bytes, av_decode: str, video_decode_audio: bool) -> Any:
    """Audio or video as one of :data:`AV_OPTIONS`.

    Without PyAV it is an ImportError, and for damaged data what PyAV raises: with "AVDecoder" only
    when a method is called.
    """
    decoder = AVDecoder(io.BytesIO(data))
    match av_decode:
        case "torch":
            return decoder.get_frames(video_decode_audio)
        case "pyav":
            return _open(decoder.stream)
    return decoder


def _open(stream: BinaryIO) -> Any:
    stream.seek(0)
    return open_recording(stream)


@dataclass(kw_only=True)
class AVData:
    """Decoded clips; empty lists for what was not asked for.

    video_clips: uint8 (frames, 3, height, width). audio_clips: (channels, samples), of the type
    that the decoder gives: integers, or floats from -1 to 1. The timestamps are seconds, at which
    each clip begins and ends.
    """

    video_clips: list[torch.Tensor]
    video_timestamps: list[Range]
    audio_clips: list[torch.Tensor]
    audio_timestamps: list[Range]


class _Frames(NamedTuple):
    """A video's frames in the order in which they are shown."""

    stamps: list[int]
    """Time stamps, in the stream's unit."""
    seconds: list[float]
    """When each begins and, last, when the last one ends."""
    keys: list[int]
    """The time stamps of those at which decoding can begin."""


@dataclass(frozen=True)
class AVDecoder:
    """Audio and video of which as much is decoded as is asked for.

    stream: the file, open for reading. The decoder pickles if that does, as ``io.BytesIO`` does.

    Asking for what the file has not (a sound track, say) is a ValueError. A clip that lies behind
    the end is left out of the result.
    """

    stream: BinaryIO

    def get_clips(
        self,
        video_clip_ranges: Sequence[Range] | None = None,
        audio_clip_ranges: Sequence[Range] | None = None,
        video_unit: Literal["frames", "seconds"] = "seconds",
        audio_unit: Literal["samples", "seconds"] = "seconds",
        video_out_frame_size: tuple[int, int] | None = None,
    ) -> AVData:
        """Clips from start to end; see :meth:`get_video_clips` and :meth:`get_audio_clips`."""
        video: Clips = ([], [])
        audio: Clips = ([], [])
        if video_clip_ranges is not None:
            video = self.get_video_clips(video_clip_ranges, video_unit, video_out_frame_size)
        if audio_clip_ranges is not None:
            audio = self.get_audio_clips(audio_clip_ranges, audio_unit)
        return AVData(
            video_clips=video[0],
            video_timestamps=video[1],
            audio_clips=audio[0],
            audio_timestamps=audio[1],
        )

    def get_video(self) -> AVData:
        """All frames, without sound."""
        return self.get_clips([(0, inf)])

    def get_audio(self) -> AVData:
        """All sound."""
        return self.get_clips(None, [(0, inf)])

    def get_video_with_audio(self) -> AVData:
        """All frames and all sound."""
        return self.get_clips([(0, inf)], [(0, inf)])

    def get_frames(self, video_decode_audio: bool = False) -> AVData | None:
        """All frames, with the sound if asked for; of what has no video, all sound, or None."""
        if self.has_video_stream():
            return self.get_video_with_audio() if video_decode_audio else self.get_video()
        return self.get_audio() if self.has_audio_stream() else None

    def get_video_clips(
        self,
        video_clip_ranges: Sequence[Range],
        video_unit: Literal["frames", "seconds"] = "seconds",
        video_out_frame_size: tuple[int, int] | None = None,
    ) -> Clips:
        """The frames that are shown at any time from start to end, the end included.

        video_unit: ``"frames"``: start and end are numbers of frames, from 0 on.
        video_out_frame_size: (width, height) to scale them to.
        """
        _check(video_clip_ranges, video_unit, "frames")
        stamps, seconds, _ = self._frames
        starts: Sequence[float] = seconds if video_unit == "seconds" else range(len(seconds))
        clips: Clips = ([], [])
        with self._opened("video") as (container, stream):
            for start, end in video_clip_ranges:
                first = max(bisect_right(starts, start) - 1, 0)
                last = min(bisect_right(starts, end), len(stamps)) - 1
                if first <= last:
                    frames = self._decode(container, stream, first, last)
                    clips[0].append(_pixels(frames, video_out_frame_size))
                    clips[1].append((seconds[first], seconds[last + 1]))
        return clips

    def get_audio_clips(
        self,
        audio_clip_ranges: Sequence[Range],
        audio_unit: Literal["samples", "seconds"] = "seconds",
    ) -> Clips:
        """The sound from start to end, the end excluded.

        audio_unit: ``"samples"``: start and end are numbers of samples, from 0 on.
        """
        _check(audio_clip_ranges, audio_unit, "samples")
        clips: Clips = ([], [])
        for start, end in audio_clip_ranges:
            with self._opened("audio") as (container, stream):
                rate = stream.sample_rate
                if audio_unit == "samples":
                    start, end = start / rate, end / rate
                at = round(start * rate)
                stop = inf if end == inf else at + round((end - start) * rate)
                pieces = []
                for here, frame in _sound(container, stream, start):
                    if here + frame.samples > at:
                        pieces.append((here, frame))
                        if here + frame.samples >= stop:
                            break
                if not pieces or pieces[0][0] > stop:
                    continue
                first, last = pieces[0][0], pieces[-1][1]
                sound = np.concatenate([_samples(frame) for _, frame in pieces], axis=1)
                clip = sound[:, max(at - first, 0) : None if stop == inf else int(stop - first)]
                clips[0].append(torch.from_numpy(np.ascontiguousarray(clip)))
                ends = float((last.pts + last.duration) * stream.time_base)
                clips[1].append((max(start, first / rate), min(end, ends)))
        return clips

    def has_video_stream(self) -> bool:
        """Whether there is video; a cover picture is none."""
        with _open(self.stream) as container:
            return _first(container, "video") is not None

    def has_audio_stream(self) -> bool:
        """Whether there is sound."""
        with _open(self.stream) as container:
            return _first(container, "audio") is not None

    def get_video_fps(self) -> float:
        """Frames in a second, on average."""
        with self._opened("video") as (_, stream):
            return float(stream.average_rate)

    def get_audio_samples_per_second(self) -> int:
        """The sampling rate."""
        with self._opened("audio") as (_, stream):
            return int(stream.sample_rate)

    def get_video_duration(self, get_frame_count: bool = False) -> tuple[float | None, int | None]:
        """Seconds of video, and how many frames if asked for; None for what there is not."""
        found = self.get_metadata()
        return found.video_duration, found.video_num_frames if get_frame_count else None

    def get_audio_duration(self) -> float | None:
        """Seconds of sound; None if there is none."""
        return self.get_metadata().audio_duration

    def get_metadata(
        self,
        get_video: bool = True,
        get_video_duration: bool = True,
        get_video_frame_count: bool = True,
        get_video_frame_size: bool = True,
        get_audio: bool = True,
        get_audio_duration: bool = True,
        get_audio_num_samples: bool = False,
    ) -> AVMetadata:
        """What is asked for of size, length and the like; None for the rest.

        get_audio_num_samples: count the samples that come out, for which the sound is decoded.
        """
        self.stream.seek(0)
        found = av_metadata(self.stream)
        known = {
            "video_duration": get_video and get_video_duration,
            "video_num_frames": get_video and get_video_frame_count,
            "video_fps": get_video,
            "video_width": get_video and get_video_frame_size,
            "video_height": get_video and get_video_frame_size,
            "audio_duration": get_audio and get_audio_duration,
            "audio_channels": get_audio,
            "audio_sample_rate": get_audio,
            "audio_num_samples": False,
        }
        found = replace(found, **{name: None for name, wanted in known.items() if not wanted})
        if get_audio and get_audio_num_samples and self.has_audio_stream():
            samples = sum(clip.shape[1] for clip in self.get_audio().audio_clips)
            found = replace(found, audio_num_samples=samples)
        return found

    @contextmanager
    def _opened(self, kind: str) -> Iterator[tuple[Any, Any]]:
        """The file opened, and its first stream of that kind."""
        with _open(self.stream) as container:
            stream = _first(container, kind)
            if stream is None:
                raise ValueError(f"there is no {kind} in it")
            yield container, stream

    @cached_property
    def _frames(self) -> _Frames:
        """All frames there are. For this the file is read, but not decoded."""
        with self._opened("video") as (container, stream):
            unit, rate = stream.time_base, stream.average_rate
            usual = (
                round(1 / (rate * unit)) if rate else 0
            )  # how long a frame lasts that does not say
            packets = sorted(
                (p.dts if p.pts is None else p.pts, p.duration or usual, p.is_keyframe)
                for p in container.demux(stream)
                if p.size and not p.is_discard
            )
        stamps = [stamp for stamp, _, _ in packets]
        end = [stamp + length for stamp, length, _ in packets[-1:]]
        keys = [stamp for stamp, _, is_key in packets if is_key]
        return _Frames(stamps, [float(stamp * unit) for stamp in stamps + end], keys)

    def _decode(self, container: Any, stream: Any, first: int, last: int) -> list[Any]:
        """The frames with these numbers and those between."""
        stamps, _, keys = self._frames
        before = keys[: bisect_right(keys, stamps[first])] or stamps
        frames: list[Any] = []
        for origin in (before[-1], stamps[0]):  # should a seek go too far, then from the beginning
            container.seek(origin, stream=stream)
            frames = []
            for frame in container.decode(stream):
                if frame.pts > stamps[last]:
                    break
                if frame.pts >= stamps[first]:
                    frames.append(frame)
                    if frame.pts == stamps[last]:
                        break
            if len(frames) == last - first + 1:
                break
        return frames


def get_clips_uniform(
    av_decoder: AVDecoder,
    clip_duration_seconds: float,
    num_clips: int,
    request_video: bool = False,
    request_audio: bool = False,
    video_out_frame_size: tuple[int, int] | None = None,
) -> AVData:
    """Clips of equal length and at equal distances, from the beginning to the end.

    What is shorter than a clip gives all of it each time.
    """
    if not (request_video or request_audio):
        raise ValueError("ask for video, audio or both: request_video=True, request_audio=True")
    found = av_decoder.get_metadata()
    lengths = [
        length
        for length, is_wanted in (
            (found.video_duration, request_video),
            (found.audio_duration, request_audio),
        )
        if is_wanted and length is not None
    ]
    latest = max(min(lengths, default=0.0) - clip_duration_seconds, 0.0)
    starts = np.linspace(0, latest, num_clips).tolist()
    ranges = [(start, start + clip_duration_seconds) for start in starts]
    return av_decoder.get_clips(
        ranges if request_video else None,
        ranges if request_audio else None,
        video_out_frame_size=video_out_frame_size,
    )


def get_single_frames_uniform(
    av_decoder: AVDecoder,
    num_frames: int,
    *,
    video_out_frame_size: tuple[int, int] | None = None,
    return_timestamps: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, list[float]]:
    """Frames at equal distances, from the first to the last: uint8 (frames, 3, height, width).

    return_timestamps: give the seconds too at which each begins.
    """
    last = len(av_decoder._frames.stamps) - 1
    numbers = [int(number + 0.5) for number in np.linspace(0, last, num_frames)]
    clips, times = av_decoder.get_video_clips(
        [(number, number) for number in numbers], "frames", video_out_frame_size
    )
    frames = torch.cat(clips)
    return (frames, [begin for begin, _ in times]) if return_timestamps else frames


def _check(ranges: Sequence[Range], unit: str, other: str) -> None:
    if unit not in ("seconds", other):
        raise ValueError(f"unknown unit {unit!r}: give 'seconds' or {other!r}")
    for start, end in ranges:
        if not start <= end:
            raise ValueError(f"the clip from {start} to {end} ends before it begins")


def _first(container: Any, kind: str) -> Any:
    """The first stream of this kind, or None."""
    from av.stream import Disposition

    streams = getattr(container.streams, kind)
    return next((s for s in streams if not s.disposition & Disposition.attached_pic), None)


def _pixels(frames: Sequence[Any], size: tuple[int, int] | None) -> torch.Tensor:
    width, height = size or (frames[0].width, frames[0].height)
    tensor = np.empty((len(frames), 3, height, width), np.uint8)
    for pixels, frame in zip(tensor, frames, strict=True):
        if size:  # first, as scaling depends on the format
            frame = frame.reformat(width=width, height=height, format="rgb24")
        # Planes of green, blue and red, with padded rows: quicker than to take pixels apart.
        scaled = frame.reformat(width=width, height=height, format="gbrp")
        for band, plane in zip((1, 2, 0), scaled.planes, strict=True):
            pixels[band] = np.frombuffer(plane, np.uint8).reshape(height, -1)[:, :width]
    return torch.from_numpy(tensor)


def _sound(container: Any, stream: Any, start: float) -> Iterator[tuple[int, Any]]:
    """Frames of sound, the number of the first sample before each, from before ``start`` on."""
    unit, rate = stream.time_base, stream.sample_rate
    # Where time stamps do not tell one sample from the next, as in Matroska, all are counted.
    if start > RUN_UP and unit * rate <= 1:
        container.seek(round((start - RUN_UP) / unit), stream=stream)
    here = None
    for frame in container.decode(stream):
        if here is None:
            here = round(frame.pts * unit * rate)
        yield here, frame
        here += frame.samples


def _samples(frame: Any) -> NDArray[Any]:
    """(channels, samples)"""
    sound: NDArray[Any] = frame.to_ndarray()
    return sound if frame.format.is_planar else sound.reshape(frame.samples, -1).T

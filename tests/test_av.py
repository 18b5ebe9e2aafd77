"""Audio and video: a clip is that part of the whole, by the times at which frames are shown."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import av_answers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn.av import AVData, AVDecoder, get_clips_uniform, get_single_frames_uniform
from energon_fn.decoding import RECORDINGS, decoder
from energon_fn.errors import SampleError

av = pytest.importorskip("av")

RATE, FRAMES, SECONDS = 25, 60, 2.4
WIDTH, HEIGHT = 64, 48
SOUND = 8000  # samples a second


def packets_of_video(stream: Any, times: list[int]) -> Iterator[Any]:
    """Frames that show their number in black and white; ``times`` are in 1/25 s."""
    for n, time in enumerate(times):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        for bit in range(8):
            pixels[:, bit * 8 : bit * 8 + 8] = 255 * (n >> bit & 1)
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame.pts, frame.time_base = time, Fraction(1, RATE)
        yield from stream.encode(frame)
    yield from stream.encode()


def packets_of_sound(stream: Any, channels: str, seconds: float) -> Iterator[Any]:
    """Every sample has a value that tells its place."""
    rate = stream.sample_rate
    places = np.arange(round(seconds * rate), dtype=np.int16)
    sound = places[None] if channels == "mono" else np.stack([places, -places])
    for start in range(0, sound.shape[1], 1000):
        piece = np.ascontiguousarray(sound[:, start : start + 1000].T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(piece, format="s16", layout=channels)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield from stream.encode(frame)
    yield from stream.encode()


@cache
def recording(
    form: str,
    video: str = "",
    audio: str = "",
    between: int = 0,
    channels: str = "stereo",
    seconds: float = SECONDS,
    rate: int = SOUND,
    uneven: bool = False,
) -> bytes:
    """A file, of each sort once."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        packets = []
        if video:
            stream = container.add_stream(video, rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.gop_size, stream.max_b_frames = 10, between
            times = [n + n // 7 * 3 if uneven else n for n in range(FRAMES)]
            packets.append(packets_of_video(stream, times))
        if audio:
            stream = container.add_stream(audio, rate=rate, layout=channels)
            packets.append(packets_of_sound(stream, channels, seconds))
        for packet in chain.from_iterable(packets):
            container.mux(packet)
    return file.getvalue()


VIDEOS: dict[str, dict[str, Any]] = {
    "mp4": {"form": "mp4", "video": "libx264"},
    "mp4, frames between": {"form": "mp4", "video": "libx264", "between": 2, "audio": "aac"},
    "mkv, frames between": {"form": "matroska", "video": "libx264", "between": 2},
    "mkv, uneven": {"form": "matroska", "video": "libx264", "between": 2, "uneven": True},
    "mov": {"form": "mov", "video": "mpeg4", "audio": "pcm_s16le"},
    "avi": {"form": "avi", "video": "mpeg4", "audio": "pcm_s16le"},
    "webm": {"form": "webm", "video": "libvpx"},
    "flv": {"form": "flv", "video": "flv1"},
}
SOUNDS: dict[str, dict[str, Any]] = {
    "wav": {"form": "wav", "audio": "pcm_s16le"},
    "wav, mono": {"form": "wav", "audio": "pcm_s16le", "channels": "mono"},
    "flac": {"form": "flac", "audio": "flac", "seconds": 4},
    "mp3": {"form": "mp3", "audio": "libmp3lame", "seconds": 4},
    "mp4": {"form": "mp4", "audio": "aac", "seconds": 4},
    "mkv": {"form": "matroska", "audio": "aac", "seconds": 4},
    "webm": {"form": "webm", "audio": "libopus", "seconds": 0.6, "rate": 48000},
    "avi": {"form": "avi", "video": "mpeg4", "audio": "pcm_s16le"},
}


def opened(**options: Any) -> AVDecoder:
    return AVDecoder(io.BytesIO(recording(**options)))


def numbers(clip: torch.Tensor) -> list[int]:
    """Which frames of :func:`packets_of_video` they are."""
    bits = clip.float().mean((1, 2)).view(len(clip), 8, -1).mean(2) > 127
    return [sum(bit << n for n, bit in enumerate(frame)) for frame in bits.tolist()]


# --- video ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VIDEOS)
def test_all_frames_in_their_order(kind: str) -> None:
    data = opened(**VIDEOS[kind]).get_video()
    (frames,), ((begin, end),) = data.video_clips, data.video_timestamps
    assert frames.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert frames.dtype == torch.uint8
    assert frames.is_contiguous()
    assert numbers(frames) == list(range(FRAMES))
    last = FRAMES - 1 + (FRAMES - 1) // 7 * 3 if VIDEOS[kind].get("uneven") else FRAMES - 1
    assert (begin, end) == pytest.approx((0, (last + 1) / RATE), abs=2e-3)
    assert data.audio_clips == data.audio_timestamps == []


@pytest.mark.parametrize("kind", VIDEOS)
def test_a_clip_by_numbers_is_that_part_of_the_whole(kind: str) -> None:
    video = opened(**VIDEOS[kind])
    whole = video.get_video().video_clips[0]
    ranges = [(first, first + n) for first in range(0, FRAMES, 13) for n in (0, 12)]
    clips, times = video.get_video_clips(ranges, "frames")
    for (first, last), clip in zip(ranges, clips, strict=True):
        assert torch.equal(clip, whole[first : last + 1])
    again, _ = video.get_video_clips(ranges[::-1], "frames")
    assert all(map(torch.equal, again, clips[::-1]))
    if not VIDEOS[kind].get("uneven"):
        for (first, last), (begin, end) in zip(ranges, times, strict=True):
            expected = first / RATE, (min(last, FRAMES - 1) + 1) / RATE
            assert (begin, end) == pytest.approx(expected, abs=2e-3)


@given(st.sampled_from(list(VIDEOS)), st.floats(-0.5, 4.5), st.floats(0, 3))
@settings(max_examples=60)
def test_a_clip_by_time_has_the_frames_shown_then(kind: str, start: float, length: float) -> None:
    video = opened(**VIDEOS[kind])
    seconds = video._frames.seconds
    shown = [
        n
        for n in range(FRAMES)
        if seconds[n] <= start + length and (start < seconds[n + 1] or start < 0)
    ]
    clips, times = video.get_video_clips([(start, start + length)])
    assert [numbers(clip) for clip in clips] == ([shown] if shown else [])
    assert times == ([(seconds[shown[0]], seconds[shown[-1] + 1])] if shown else [])


def test_frames_that_are_shown_long_are_in_every_clip_of_that_time() -> None:
    video = opened(**VIDEOS["mkv, uneven"])  # frame 6 from 0.24 to 0.4
    clips, times = video.get_video_clips([(0.3, 0.3), (0.25, 0.41), (0.39, 0.39)])
    assert [numbers(clip) for clip in clips] == [[6], [6, 7], [6]]
    assert times == [(0.24, 0.4), (0.24, 0.44), (0.24, 0.4)]


def test_the_end_of_a_clip_is_a_time_of_its_own() -> None:
    clips, _ = opened(**VIDEOS["mp4"]).get_video_clips([(0, 0.2), (0.2, 0.2), (0.6, 0.6), (1, 1.2)])
    assert [numbers(clip) for clip in clips] == [[*range(6)], [5], [15], [*range(25, 31)]]


def test_clips_behind_the_end_are_left_out() -> None:
    video = opened(**VIDEOS["mp4, frames between"])
    clips, times = video.get_video_clips([(2.3, 9), (2.4, 3), (100, inf), (0, 0)])
    assert [numbers(clip) for clip in clips] == [[57, 58, 59], [0]]
    assert len(times) == 2
    assert video.get_video_clips([(60, 61), (-9, -3)], "frames") == ([], [])
    clips, times = video.get_audio_clips([(50, 60), (0, 0.1)])
    assert [clip.shape for clip in clips] == [(2, 800)]
    assert times == [(0, 0.1)]


def test_frames_can_be_scaled() -> None:
    video = opened(**VIDEOS["mp4"])
    small = video.get_video_clips([(0.4, 0.5)], video_out_frame_size=(32, 16))[0][0]
    assert small.shape == (3, 3, 16, 32)
    assert numbers(small) == [10, 11, 12]


# --- sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOUNDS)
def test_a_piece_of_sound_is_that_part_of_the_whole(kind: str) -> None:
    sound = opened(**SOUNDS[kind])
    data = sound.get_audio()
    (whole,), ((begin, end),) = data.audio_clips, data.audio_timestamps
    rate = sound.get_audio_samples_per_second()
    before = round(begin * rate)  # an MP3 of libav begins some milliseconds late
    count = whole.shape[1]
    assert whole.shape[0] == (1 if kind == "wav, mono" else 2)
    assert whole.is_contiguous()
    # The last frame of a codec is filled up; the container knows how much of it is meant.
    assert -50 < count - (end - begin) * rate < 2048
    for start in (0, before + 5, count // 3, count // 2 + 7, count - 1000):
        for length in (1, 500, 3000):
            stop = start + length
            clips, all_times = sound.get_audio_clips([(start, stop)], "samples")
            if stop < before:
                assert clips == all_times == []
                continue
            (clip,), (times,) = clips, all_times
            assert torch.equal(clip, whole[:, max(start - before, 0) : max(stop - before, 0)])
            expected = max(start / rate, begin), min(stop / rate, end)
            assert times == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["wav", "flac", "avi"])
def test_every_sample_is_in_its_place(kind: str) -> None:
    sound = opened(**SOUNDS[kind])
    places = torch.arange(SOUNDS[kind].get("seconds", SECONDS) * SOUND).to(torch.int16)
    whole = sound.get_audio().audio_clips[0]
    assert whole.dtype == torch.int16
    assert torch.equal(whole, torch.stack([places, -places]))
    clips, times = sound.get_audio_clips([(1.5, 1.75), (0.29, 0.3), (1 / 3, 2 / 3), (0.5, 0.5)])
    for clip, first, count in zip(
        clips, (12000, 2320, 2667, 4000), (2000, 80, 2667, 0), strict=True
    ):
        assert torch.equal(clip, whole[:, first : first + count])
    assert times == [(1.5, 1.75), (0.29, 0.3), (1 / 3, 2 / 3), (0.5, 0.5)]


# --- both -----------------------------------------------------------------------------------------


def test_what_is_not_asked_for_is_empty_and_what_is_missing_an_error() -> None:
    both, silent = opened(**VIDEOS["mov"]), opened(**VIDEOS["mp4"])
    sound = opened(**SOUNDS["wav"])

    def shapes(data: AVData | None) -> tuple[list[Any], list[Any]]:
        assert data is not None
        assert len(data.video_clips) == len(data.video_timestamps)
        assert len(data.audio_clips) == len(data.audio_timestamps)
        clips = data.video_clips, data.audio_clips
        return [len(clip) for clip in clips[0]], [clip.shape for clip in clips[1]]

    samples = (2, round(SECONDS * SOUND))
    assert shapes(both.get_clips()) == ([], [])
    assert shapes(both.get_video()) == ([FRAMES], [])
    assert shapes(both.get_audio()) == ([], [samples])
    assert shapes(both.get_video_with_audio()) == ([FRAMES], [samples])
    assert shapes(both.get_frames()) == ([FRAMES], [])
    assert shapes(both.get_frames(video_decode_audio=True)) == ([FRAMES], [samples])
    assert shapes(sound.get_frames()) == ([], [samples])
    clips = both.get_clips([(0, 2)], [(5, 9)], video_unit="frames", audio_unit="samples")
    assert shapes(clips) == ([3], [(2, 4)])
    missing: list[tuple[str, Callable[[], Any]]] = [
        ("audio", silent.get_audio),
        ("audio", silent.get_video_with_audio),
        ("audio", silent.get_audio_samples_per_second),
        ("video", sound.get_video),
        ("video", sound.get_video_fps),
    ]
    for kind, ask in missing:
        with pytest.raises(ValueError, match=f"there is no {kind} in it"):
            ask()


def test_ranges_and_units_that_make_no_sense_are_errors() -> None:
    both = opened(**VIDEOS["mov"])
    for clips in (both.get_video_clips, both.get_audio_clips):
        with pytest.raises(ValueError, match="from 2 to 1 ends before it begins"):
            clips([(0, 1), (2, 1)])
        with pytest.raises(ValueError, match="unknown unit 'minutes': give 'seconds' or '"):
            clips([(0, 1)], "minutes")  # type: ignore[arg-type]


def test_metadata_has_what_is_asked_for() -> None:
    video = opened(**VIDEOS["mp4, frames between"])
    everything = {
        "video_duration": SECONDS,
        "video_num_frames": FRAMES,
        "video_fps": RATE,
        "video_width": WIDTH,
        "video_height": HEIGHT,
        "audio_duration": SECONDS,
        "audio_channels": 2,
        "audio_sample_rate": SOUND,
        "audio_num_samples": video.get_audio().audio_clips[0].shape[1],
    }
    assert vars(video.get_metadata(get_audio_num_samples=True)) == everything
    some = video.get_metadata(get_video_frame_count=False, get_video_frame_size=False)
    expected = everything | dict.fromkeys(
        ("video_num_frames", "video_width", "video_height", "audio_num_samples")
    )
    assert vars(some) == expected
    nothing = video.get_metadata(get_video=False, get_audio=False)
    assert set(vars(nothing).values()) == {None}
    assert (video.has_video_stream(), video.has_audio_stream()) == (True, True)
    assert video.get_video_duration() == (SECONDS, None)
    assert video.get_video_duration(get_frame_count=True) == (SECONDS, FRAMES)
    assert video.get_audio_duration() == SECONDS
    assert video.get_video_fps() == RATE
    assert video.get_audio_samples_per_second() == SOUND
    assert opened(**VIDEOS["mp4"]).get_audio_duration() is None


def test_clips_at_equal_distances() -> None:
    both = opened(**VIDEOS["mov"])
    data = get_clips_uniform(both, 0.4, 5, request_video=True, request_audio=True)
    assert [numbers(clip)[0] for clip in data.video_clips] == [0, 12, 25, 37, 50]
    assert data.audio_timestamps == [(n / 2, n / 2 + 0.4) for n in range(5)]
    assert [clip.shape for clip in data.audio_clips] == [(2, 3200)] * 5
    longer = get_clips_uniform(both, 9, 2, request_audio=True)
    assert [clip.shape for clip in longer.audio_clips] == [(2, round(SECONDS * SOUND))] * 2
    with pytest.raises(ValueError, match="ask for video, audio or both"):
        get_clips_uniform(both, 1, 2)


def test_frames_at_equal_distances() -> None:
    video = opened(**VIDEOS["mkv, frames between"])
    for count, expected in ((1, [0]), (2, [0, 59]), (4, [0, 20, 39, 59]), (60, range(60))):
        frames, times = get_single_frames_uniform(video, count, return_timestamps=True)
        assert isinstance(frames, torch.Tensor)
        assert numbers(frames) == list(expected)
        assert times == pytest.approx([n / RATE for n in expected], abs=2e-3)
    small = get_single_frames_uniform(video, 3, video_out_frame_size=(16, 8))
    assert isinstance(small, torch.Tensor)
    assert small.shape == (3, 3, 8, 16)


def test_a_decoder_pickles_with_its_file() -> None:
    video = opened(**VIDEOS["mp4"])
    expected = video.get_video_clips([(1, 1.1)])[0][0]
    again = pickle.loads(pickle.dumps(video))
    assert torch.equal(again.get_video_clips([(1, 1.1)])[0][0], expected)


# --- parts of samples -----------------------------------------------------------------------------


@pytest.mark.parametrize("extension", RECORDINGS.split())
def test_recordings_in_samples_are_decoded_when_asked(extension: str) -> None:
    value = decoder()({f"a.{extension}": b"anything"})[f"a.{extension}"]
    assert isinstance(value, AVDecoder)
    with pytest.raises(Exception, match="Invalid data"):
        value.get_video()


def test_a_sample_can_have_all_of_it_or_the_container() -> None:
    data = recording(**VIDEOS["mov"])
    video = decoder(av_decode="torch")({"mov": data})["mov"]
    assert numbers(video.video_clips[0]) == list(range(FRAMES))
    assert video.audio_clips == []
    both = decoder(av_decode="torch", video_decode_audio=True)({"mov": data})["mov"]
    assert both.audio_clips[0].shape == (2, round(SECONDS * SOUND))
    sound = decoder(av_decode="torch")({"wav": recording(**SOUNDS["wav"])})["wav"]
    assert torch.equal(sound.audio_clips[0], both.audio_clips[0])
    with decoder(av_decode="pyav")({"mov": data})["mov"] as container:
        assert len(list(container.decode(video=0))) == FRAMES


def test_guess_content_finds_recordings() -> None:
    decode = decoder(guess_content=True)
    for options in (
        {**VIDEOS["mp4"]},
        SOUNDS["wav"],
        SOUNDS["flac"],
        SOUNDS["mp3"],
        VIDEOS["webm"],
    ):
        for name in ("bin", "jpg", "txt", ""):
            assert isinstance(decode({name: recording(**options)})[name], AVDecoder)


def test_damaged_recordings_are_sample_errors() -> None:
    data = recording(**VIDEOS["mp4"])
    decode = decoder(av_decode="torch")
    for damaged in (b"", b"RIFF", data[:500]):
        with pytest.raises(SampleError, match=r"part 'x.mp4' .*'k'.*Invalid data"):
            decode({"__key__": "k", "x.mp4": damaged})


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    value = decoder()({"mp4": b"x"})["mp4"]
    for ask in (value.get_video, value.get_metadata):
        with pytest.raises(ImportError, match=r"pip install energon-fn\[av\]"):
            ask()
    for how in ("torch", "pyav"):
        with pytest.raises(ImportError, match=r"pip install energon-fn\[av\]"):
            decoder(av_decode=how)({"mp4": b"x"})


# --- the published decoder ------------------------------------------------------------------------


def test_the_published_decoder_gives_the_same(tmp_path: Path, published_python: str) -> None:
    """Of files that it cuts exactly: not those with frames between, and not compressed sound."""
    check = [published_python, "-c", "import av, megatron.energon.av"]
    if subprocess.run(check, capture_output=True).returncode:
        pytest.skip("the published package is there without its extra av_decode")
    files: list[str] = []
    for options in [*VIDEOS.values(), *SOUNDS.values()]:
        compressed = options.get("audio") not in (None, "pcm_s16le", "flac")
        # It cannot seek in FLV.
        if not (options.get("between") or compressed or options["form"] == "flv"):
            files.append(str(tmp_path / f"{len(files)}.bin"))
            Path(files[-1]).write_bytes(recording(**options))
    ask = [published_python, av_answers.__file__, "megatron.energon.av", *files]
    done = subprocess.run(ask, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(theirs) == len(files) > 5
    assert av_answers.answers("energon_fn.av", files) == theirs

"""What a package's AVDecoder says of files: a module to import, and a script to run elsewhere.

``python av_answers.py megatron.energon.av FILE...`` prints it as JSON. Pixels and samples are told
by their hashes.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

METADATA = (
    "video_duration video_num_frames video_fps video_width video_height "
    "audio_duration audio_channels audio_sample_rate audio_num_samples"
)


def answers(package: str, files: list[str]) -> list[Any]:
    av = importlib.import_module(package)
    return [_of_file(av, Path(file).read_bytes()) for file in files]


def _of_file(av: Any, data: bytes) -> list[Any]:
    decoder = av.AVDecoder(io.BytesIO(data))
    metadata = decoder.get_metadata(get_audio_num_samples=True)
    found = [[name, _rounded(getattr(metadata, name))] for name in METADATA.split()]
    ranges = [(0.5, 0.7), (0.0, 0.0), (1.0, 1.2), (0.41, 0.43), (1.95, 9), (90, 99)]
    if decoder.has_video_stream():
        whole = decoder.get_video()
        frames, times = av.get_single_frames_uniform(decoder, 7, return_timestamps=True)
        found += [
            _clips(whole.video_clips, whole.video_timestamps),
            _clips(*decoder.get_video_clips(ranges)),
            _clips(*decoder.get_video_clips([(30, 30), (3, 5), (48, 77)], "frames")),
            _clips(*decoder.get_video_clips([(0, 0.1)], video_out_frame_size=(32, 16))),
            _clips([frames], [times]),
        ]
    if decoder.has_audio_stream():
        whole = decoder.get_audio()
        uniform = av.get_clips_uniform(decoder, 0.3, 5, request_audio=True)
        ranges = [(0.5, 0.7), (1.0, 1.2), (1 / 3, 2 / 3), (1.9, 9)]
        found += [
            _clips(whole.audio_clips, whole.audio_timestamps),
            _clips(*decoder.get_audio_clips(ranges)),
            _clips(*decoder.get_audio_clips([(90, 99)])),
            _clips(*decoder.get_audio_clips([(0, 100), (1600, 3200)], "samples")),
            _clips(uniform.audio_clips, uniform.audio_timestamps),
        ]
    return found


def _clips(clips: Any, times: Any) -> list[Any]:
    hashes = [hashlib.sha1(clip.contiguous().numpy().tobytes()).hexdigest() for clip in clips]
    shapes = [[list(clip.shape), str(clip.dtype)] for clip in clips]
    return [hashes, shapes, [[round(time, 2) for time in each] for each in times]]


def _rounded(value: Any) -> Any:
    return value and round(value, 3)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(answers(sys.argv[1], sys.argv[2:])))

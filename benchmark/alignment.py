"""Does alignment here verify as well as crops that came aligned: a detector a row, one model for all.

    python -m benchmark.alignment --model mobilefacenet_128.onnx --pairs lfw.bin --people gallery/ \\
        --det_model mtcnn yunet.onnx scrfd.onnx retinaface.onnx [--minutes 4]

PAIRS: a pair set of aligned 112x112 faces. Each is evaluated as it came, and with every face found and aligned anew by
each detector (one in which none is found stays as it came, and is counted). PEOPLE: a folder <person>/<photo> of whole
photos: the largest face of each, aligned, and, for what a wrong alignment costs, the same box cut out and stretched.
Said is how often the nearest of the other photos is the same person's, and the best accuracy over all pairs.

The record is written after each row, and a second call does only what is missing; --minutes ends one in time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmark.record import RESULTS, write_record
from data.pairs import load_pairs
from deploy.alignment import align_faces
from deploy.backends import load_recognizer
from deploy.detection import open_detector
from deploy.photos import list_photos, read_photo
from runtime.device import parse_device
from verify.protocol import evaluate_pairs

CAME = "as they came"
STRETCHED = "stretched boxes of "


def embed(recognizer, faces) -> np.ndarray:
    return np.concatenate([recognizer.embed(np.stack(faces[i : i + 64])) for i in range(0, len(faces), 64)])


def of_pairs(recognizer, detector, images, issame_N) -> dict:
    faces, missed = [], 0
    for image_HWC in (images[i] for i in range(len(images))):
        found = detector.detect(image_HWC) if detector else ()
        missed += detector is not None and not len(found)
        faces.append(align_faces(image_HWC, found.points_N52[[found.largest()]])[0] if len(found) else image_HWC)
    accuracy = evaluate_pairs(embed(recognizer, faces), issame_N).accuracy
    return {"pairs_accuracy": round(float(accuracy), 4), "pairs_without_face": int(missed), "images": len(faces)}


def of_people(recognizer, detector, folder, stretched: bool) -> dict:
    faces, people, missed = [], [], 0
    for photo in list_photos(folder):
        image_HWC = read_photo(folder / photo)
        found = detector.detect(image_HWC)
        if not len(found):
            missed += 1
            continue
        row = found.largest()
        if stretched:
            x1, y1, x2, y2 = np.round(found.boxes_N4[row]).astype(int)
            faces.append(np.asarray(Image.fromarray(image_HWC[y1:y2, x1:x2]).resize((112, 112), Image.BILINEAR)))
        else:
            faces.append(align_faces(image_HWC, found.points_N52[[row]])[0])
        people.append(photo.parts[0])
    emb_ND, (_, person_N) = embed(recognizer, faces), np.unique(people, return_inverse=True)
    cosine_NN = emb_ND @ emb_ND.T
    first, second = np.triu_indices(len(emb_ND), k=1)
    cosine_P, same_P = cosine_NN[first, second], person_N[first] == person_N[second]
    best = max(((cosine_P > threshold) == same_P).mean() for threshold in np.unique(cosine_P))
    np.fill_diagonal(cosine_NN, -2)
    nearest = (person_N[cosine_NN.argmax(axis=1)] == person_N).mean()
    found = {"nearest_is_the_person": round(float(nearest), 4), "best_accuracy_of_all_pairs": round(float(best), 4)}
    return {**found, "photos": len(faces), "photos_without_face": missed}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--people", required=True, type=Path)
    parser.add_argument("--det_model", nargs="+", default=["mtcnn"], help="ONNX files, or mtcnn")
    parser.add_argument("--minutes", type=float, default=0, help="begin no row after so many minutes; 0: never mind")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args(argv)
    known = sorted(options.results.glob("*_alignment.json"))
    rows = json.loads(known[-1].read_text())["rows"] if known else {}
    _, recognizer = load_recognizer(options.model)
    images, issame_N = load_pairs(options.pairs)
    started = time.time()
    todo = [(CAME, None, False)]
    for path in options.det_model:
        name = Path(path).stem
        todo += [(name, path, False), (STRETCHED + name, path, True)]
    for name, path, stretched in todo:
        if name in rows:
            continue
        if options.minutes and time.time() - started > 60 * options.minutes:
            print("more is left: the same command goes on")
            return
        detector = None if path is None else open_detector("" if path == "mtcnn" else path)
        rows[name] = {} if stretched else of_pairs(recognizer, detector, images, issame_N)
        if detector:
            rows[name].update(of_people(recognizer, detector, options.people, stretched))
        print(json.dumps({name: rows[name]}), flush=True)
        command = "python -m benchmark.alignment --model MODEL --pairs PAIRS --people PEOPLE --det_model MTCNN_OR_FILES"
        content = {"model": Path(options.model).name, "rows": rows}
        write_record("alignment", content, parse_device("cpu"), options.results, command)


if __name__ == "__main__":
    main()

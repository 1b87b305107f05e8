"""The demo: photos, folders and videos to names, pictures and JSON, and everything that can be wrong with them."""

from __future__ import annotations

import json
import logging
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from tiny_deploy import RedFaces, picture, tiny_onnx

import insightface_paddle as face
from deploy import demo, drawing
from deploy.gallery import Gallery
from runtime.errors import ConfigError, GalleryError

pytest.importorskip("onnxruntime")
ANN, BOB, EVE = (30, 220, 40), (40, 30, 230), (250, 240, 20)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, and a gallery of ann and bob."""
    monkeypatch.setattr(demo, "open_detector", lambda *_: RedFaces())
    tiny_onnx(tmp_path / "model.onnx")
    for name, colour in (("ann", ANN), ("bob", BOB)):
        (tmp_path / "people" / name).mkdir(parents=True)
        Image.fromarray(picture(colour)).save(tmp_path / "people" / name / "1.png")
    build(tmp_path).build_index()
    return tmp_path


def options(folder, *words):
    return face.parser().parse_args([f"--rec_model={folder}/model.onnx", f"--output={folder}/output", *words])


def build(folder, *words):
    return face.InsightFace(options(folder, f"--build_index={folder}/g.db", f"--img_dir={folder}/people", *words))


def recogniser(folder, *words):
    return face.InsightFace(options(folder, "--det", "--rec", f"--index={folder}/g.db", "--rec_thresh=0.9", *words))


def test_python_use_is_a_generator_of_the_originals_dictionaries(place, caplog):
    with caplog.at_level(logging.INFO):
        results = recogniser(place).predict(picture(BOB, EVE, ANN))
        assert not (place / "output").exists()  # nothing happens until next()
        result = next(results)
    assert result["labels"] == ["bob", "unknown", "ann"]
    assert result["features"].shape == (3, 1, 3)
    boxes = result["box_list"]
    assert boxes.shape == (3, 6) and boxes[1].tolist() == [0, pytest.approx(0.9), 122, 3, 234, 115]
    assert (place / "output" / "tmp.png").is_file()
    assert "File: tmp.png, predict label(s): ['bob', 'unknown', 'ann']" in caplog.text


def test_a_picture_and_its_json(place):
    Image.fromarray(picture(ANN, EVE)).save(place / "query.png")
    list(recogniser(place, "--cdd_num=2").predict(str(place / "query.png")))
    told = json.loads((place / "output" / "query.png.json").read_text())
    first, second = told["faces"]
    assert first["label"] == "ann" and first["similarity"] > 0.99 and second["label"] == "unknown"
    assert [one["label"] for one in first["candidates"]] == ["ann", "bob"]
    drawn = np.asarray(Image.open(place / "output" / "query.png"))
    assert (drawn[:, 2] == (0, 0, 0)).all(-1).sum() > 100  # ann's box in the first colour
    assert (drawn[20:110, 122] == (128, 0, 0)).all()  # the second


def test_detection_alone_and_the_whole_picture_as_a_face(place, caplog):
    (found,) = face.InsightFace(options(place, "--det")).predict(picture(ANN))
    assert found["labels"] == ["face"] and found["features"] is None
    alone = face.InsightFace(options(place, "--rec", f"--index={place}/g.db", "--rec_thresh=0.9"))
    (found,) = alone.predict(np.full((300, 200, 3), BOB, np.uint8))
    assert found["labels"] == ["bob"] and found["box_list"] is None
    with_warning = face.InsightFace(options(place, "--det", "--rec"))
    assert "without --index" in caplog.text and next(with_warning.predict(picture(ANN)))["labels"] == ["face"]


def test_a_folder_goes_on_past_what_is_no_photo(place, caplog):
    folder = place / "in"
    (folder / "below").mkdir(parents=True)
    Image.fromarray(picture(ANN)).save(folder / "a.png")
    (folder / "b.jpg").write_text("text")
    (folder / "c.mp4").write_text("no video")
    (folder / "d.txt").write_text("text")
    Image.new("RGB", (1, 1)).save(folder / "e.bmp")
    Image.fromarray(picture(BOB)).convert("CMYK").save(folder / "f.jpg")
    results = list(recogniser(place).predict(folder))
    assert [result["labels"] for result in results][:2] == [["ann"], []] and len(results) == 3
    for words in ("b.jpg: not an image", "d.txt: is no image, skipped"):
        assert words in caplog.text
    with pytest.raises(ConfigError, match="no such file"):
        list(recogniser(place).predict(place / "missing.jpg"))


def test_a_users_picture_is_not_replaced(place):
    Image.fromarray(picture(ANN)).save(place / "query.png")
    before = (place / "query.png").read_bytes()
    with pytest.raises(ConfigError, match="input's own folder"):
        list(recogniser(place, f"--output={place}").predict(place / "query.png"))
    assert (place / "query.png").read_bytes() == before
    (place / "output").mkdir()
    (place / "output" / "query.png").write_text("mine")
    with pytest.raises(ConfigError, match="is not this command's"):
        list(recogniser(place).predict(place / "query.png"))


def test_the_originals_rules(place):
    """A vote of the nearest by |cosine|, not the nearest; and the detection's score is drawn."""
    for shot in range(2, 5):
        Image.fromarray(picture((60, 50, 200))).save(place / "people" / "bob" / f"{shot}.png")
    (place / "g.db").unlink()
    build(place).build_index()
    between = picture((30, 180, 60))  # nearest to ann, but three of the four nearest within reach are bob
    (ours,) = recogniser(place, "--rec_thresh=-1").predict(between)
    (theirs,) = recogniser(place, "--rec_thresh=-1", "--like_original").predict(between)
    assert ours["labels"] == ["ann"] and theirs["labels"] == ["bob"]


def test_building_a_gallery_with_broken_photos(place, caplog):
    (place / "people" / "bob" / "broken.jpg").write_text("text")
    Image.new("RGB", (150, 150)).save(place / "people" / "bob" / "nobody.png")
    (place / "people" / "line\nfeed").mkdir()
    Image.fromarray(picture(EVE)).save(place / "people" / "line\nfeed" / "1.png")
    label = place / "label.txt"
    label.write_text("./ann/1.png\t安妮/甲\nbob/1.png\tbob\nno tab\n../model.onnx\tx\nbob/broken.jpg\tbob\n\n")
    build(place).build_index()  # a gallery of ours is replaced
    with Gallery.open(place / "g.db") as gallery:
        assert gallery.people() == {"ann": 1, "bob": 1}
    for words in ("bob/broken.jpg: not an image", "bob/nobody.png: no face was found", "printable characters"):
        assert words in caplog.text
    build(place, f"--label={label}").build_index()
    with Gallery.open(place / "g.db") as gallery:
        assert gallery.people() == {"bob": 1, "安妮/甲": 1}
    label.write_text("bob/broken.jpg\tbob\n")
    with pytest.raises(GalleryError, match="no photo gave a face"):
        build(place, f"--label={label}").build_index()
    (place / "mine.db").write_text("mine")
    with pytest.raises(GalleryError, match="is no gallery"):
        build(place, f"--build_index={place}/mine.db").build_index()
    assert not list(place.glob(".*"))


@pytest.mark.parametrize("words, message", [
    ([], "nothing to do"), (["--build_index=x"], "--img_dir"), (["--rec"], "--rec needs --index"),
    (["--build_index=x", "--det", "--img_dir=y"], "without --det"), (["--det", "--rec_thresh=2"], "a cosine"),
    (["--det", "--max_batch_size=0"], "at least 1"), (["--det", "--det_model=BlazeFace"], "models of Paddle"),
    (["--det", "--rec", "--index=missing"], "no such gallery"),
])  # fmt: skip
def test_options_that_do_not_go_together(place, words, message):
    with pytest.raises((ConfigError, GalleryError), match=message):
        face.InsightFace(options(place, *words))


def test_two_people_of_one_name_and_nobody_are_said(place, caplog):
    (place / "label.txt").write_text("ann/1.png\tWang Wei\nbob/1.png\tWang Wei\nann/1.png\teve\n")
    build(place, f"--label={place}/label.txt").build_index()
    assert "bob/1.png: is of Wang Wei, as photos in ann are: both are taken for one person" in caplog.text
    assert caplog.text.count("taken for one person") == 1
    with Gallery.open(place / "g.db") as gallery:
        assert gallery.people() == {"Wang Wei": 2, "eve": 1}
        gallery.remove("Wang Wei"), gallery.remove("eve")
    (result,) = recogniser(place).predict(picture(ANN))
    assert result["labels"] == ["unknown"] and "is an empty gallery: everybody is unknown" in caplog.text


def test_no_threshold_is_said(place, caplog):
    face.InsightFace(options(place, "--det", "--rec", f"--index={place}/g.db"))
    assert "no threshold is calibrated" in caplog.text
    assert face.parser().parse_args(["--use_gpu=False"]).use_gpu is False
    assert face.parser().parse_args(["--use_gpu=T"]).use_gpu is True


def write_video(path, frames, rate):
    writer = demo.VideoWriter(path, Fraction(rate))
    for frame in frames:
        writer.write(frame)
    writer.close()


def test_a_video_keeps_its_frame_rate_and_size(place, monkeypatch):
    pytest.importorskip("av")

    class Always(RedFaces):  # compression leaves no pixel pure red
        def detect(self, image_HWC):
            return super().detect(picture(ANN))

    monkeypatch.setattr(demo, "open_detector", lambda *_: Always())
    frames = [picture(ANN) if number < 6 else picture(BOB) for number in range(12)]
    write_video(place / "v.mp4", frames, 12)
    results = list(recogniser(place).predict(place / "v.mp4"))
    assert [result["labels"] for result in results] == [["ann"]] * 6 + [["bob"]] * 6
    video = demo.VideoReader(place / "output" / "v.mp4")
    again = list(video)
    assert video.rate == 12 and len(again) == 12 and again[0].image_HWC.shape == picture(ANN).shape
    assert again[6].seconds == pytest.approx(0.5)
    told = json.loads((place / "output" / "v.mp4.json").read_text())
    assert [one["seconds"] for one in told][:2] == [0, 0.0833] and told[6]["faces"][0]["label"] == "bob"
    list(recogniser(place, "--like_original", f"--output={place}/old").predict(place / "v.mp4"))
    assert demo.VideoReader(place / "old" / "v.mp4").rate == 30


def test_videos_without_frames_cut_off_and_of_odd_size(place, caplog):
    av = pytest.importorskip("av")
    (place / "empty.mp4").write_bytes(b"")
    with av.open(str(place / "none.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    write_video(place / "odd.mp4", [np.full((121, 77, 3), 90, np.uint8)] * 3, 10)
    assert not list(recogniser(place).predict(place / "empty.mp4")) and not list(
        recogniser(place).predict(place / "none.mp4")
    )
    assert "empty.mp4: is no video" in caplog.text and "none.mp4: " in caplog.text
    assert len(list(recogniser(place).predict(place / "odd.mp4"))) == 3
    (frame, *_) = demo.VideoReader(place / "output" / "odd.mp4")
    assert frame.image_HWC.shape == (121, 77, 3)
    assert not [path for path in (place / "output").iterdir() if path.suffix == ".tmp"]


def test_drawing_stays_inside_and_finds_a_font(caplog):
    image = np.zeros((60, 80, 3), np.uint8)
    boxes = np.array([[-5, -5, 300, 300], [70, 2, 79, 20]])
    drawn = drawing.draw_faces(image, boxes, ["a name that is much too long for the picture", "王"], [(0, 0, 255)] * 2)
    assert drawn.shape == image.shape and drawn.any() and not image.any()
    assert drawing.chinese_font() or "no font with Chinese" in caplog.text
    assert [drawing.colour(n) for n in (0, 1, 2, 3, 4)] == [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
    ]


def test_friends(shared, tmp_path):
    """The six people of a real photo, from a gallery of six photos each, with every name right."""
    friends, models = shared / "real" / "friends", shared / "models"
    common = [f"--rec_model={models}/mobilefacenet_128.onnx", f"--det_model={models}/yunet_n_dynamic.onnx"]
    words = [f"--build_index={tmp_path}/g.db", f"--img_dir={friends}/gallery", f"--label={friends}/gallery/label.txt"]
    face.InsightFace(face.parser().parse_args([*common, *words])).build_index()
    words = ["--det", "--rec", f"--index={tmp_path}/g.db", f"--output={tmp_path}/output", "--rec_thresh=0.35"]
    (result,) = face.InsightFace(face.parser().parse_args([*common, *words])).predict(friends / "friends2.jpg")
    left_to_right = [result["labels"][i] for i in np.argsort(result["box_list"][:, 2])]
    assert left_to_right == ["Joey", "Phoebe", "Monica", "Ross", "Rachel", "Chandler"]
    assert min(result["similarities"]) > 0.45

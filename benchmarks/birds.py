"""A pretrained teacher and a pretrained small student on few images of many classes: 525 birds.

    python benchmarks/birds.py --root birds525 --teacher-weights tf_efficientnet_lite0.safetensors \\
        --student-weights squeezenet1_1.safetensors

--root is an image folder with train/ and val/ (and test/, where there is one; else val is reported, and nothing is
chosen on it). Teacher: EfficientNet-Lite0, of which only the new head is trained (three images a class spoil pretrained
features sooner than they improve them); student: SqueezeNet 1.1 with all of its layers; both from ImageNet weights. The
student is trained with the labels alone and with the teacher, with the same images, epochs and learning rate.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from arms import Arm, Benchmark, paired_points, print_table, spread, stage_accuracy


def main() -> None:
    benchmark = Benchmark("birds", __doc__ or "")
    parser = benchmark.parser
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--teacher-weights", type=Path, required=True)
    parser.add_argument("--student-weights", type=Path, required=True)
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--teacher-size", type=int, default=224, help="side of the teacher's images in px")
    parser.add_argument("--size", type=int, default=128, help="side of the students' images in px")
    parser.add_argument("--method", default="kd", choices=("kd", "dkd", "feature", "relation"))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of the teacher's term")
    arguments = parser.parse_args()

    data = {"name": "image_folder", "root": str(arguments.root)}
    teacher_model: dict[str, Any] = {
        "name": f"{os.path.relpath(Path(__file__).with_name('frozen_lite0.py'))}:build",
        "preprocessing": {
            "input_size": arguments.teacher_size,
            "crop_fraction": 1.0,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
        },
    }
    student_model: dict[str, Any] = {
        "name": "torchvision/squeezenet1_1",
        "checkpoint": str(arguments.student_weights),
        "preprocessing": {"input_size": arguments.size, "crop_fraction": 1.0},
    }
    int8 = {"kind": "quantize", "id": "int8", "placement": "full"}
    augment = {"horizontal_flip": True, "crop_min_area": 0.7}
    training = {"batch_size": 32, "weight_decay": 1e-4, "gradient_clip_norm": 5.0, "augment": augment}
    taught = {**training, "epochs": arguments.epochs, "learning_rate": 0.01, "id": "student"}
    teacher = Arm(
        "teacher",
        {
            "data": data,
            "model": {**teacher_model, "checkpoint": str(arguments.teacher_weights)},
            "stages": [
                {
                    "kind": "train",
                    "id": "teacher",
                    "epochs": arguments.teacher_epochs,
                    "batch_size": 32,
                    "learning_rate": 0.05,
                    "weight_decay": 1e-4,
                    "augment": {"horizontal_flip": True},
                },
                int8,
            ],
        },
        stage="teacher",
        seeds=1,
    )
    alone = Arm(
        "student alone",
        {"data": data, "model": student_model, "stages": [{**taught, "kind": "train"}, int8]},
        stage="student",
    )
    source = {"model": {**teacher_model, "checkpoint": "@teacher/teacher"}, "method": arguments.method}
    # One pass of the teacher over the images as they are: in every step, it would cost more than the student.
    block = {**source, "temperature": arguments.temperature, "alpha": arguments.alpha, "view": "clean"}
    distilled = Arm(
        "student distilled",
        {
            "data": data,
            "model": student_model,
            "stages": [{**taught, "kind": "distill", "teacher": block}, int8],
        },
        stage="student",
    )
    found = benchmark.run(arguments, [teacher, alone, distilled])
    alone_results = found[alone.name]
    rows = []
    for name, results, stage in (
        (teacher.name, found[teacher.name], None),
        (alone.name, alone_results, None),
        (distilled.name, found[distilled.name], None),
        ("student distilled, int8", found[distilled.name], "int8"),
    ):
        chosen = [{**r, **r["stages"][stage]} for r in results] if stage else results
        is_taught = name.startswith("student distilled")
        rows.append(
            (
                name,
                spread(stage_accuracy(chosen)),
                paired_points(chosen, alone_results) if is_taught else "",
                f"{chosen[0]['params']:,}" if chosen else "",
                f"{chosen[0]['size_bytes'] / 1e6:.2f} MB" if chosen else "",
                str(len(results)),
            )
        )
    split = next((r["accuracy_split"] for results in found.values() for r in results), "val")
    print_table(
        f"Birds, {arguments.method}: accuracy in % on {split}, last epoch, mean (min to max) over seeds",
        ("model", "accuracy", "points against alone, paired [95 %]", "params", "size", "seeds"),
        rows,
        found,
    )


if __name__ == "__main__":
    main()

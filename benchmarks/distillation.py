"""What distillation gains a small student, by method: mean and spread over seeds.

    python benchmarks/distillation.py
    python benchmarks/distillation.py --table
    python benchmarks/distillation.py --size 28 --results results/full-size
    python benchmarks/distillation.py --data image_folder --root cifar10 --size 32 --results results/cifar

One teacher is trained once, on a class-balanced share of the training images. The student is trained from random
weights on a share of those, with the labels alone and with each method: the same images, epochs, batches and learning
rate. So the teacher has seen more images than its student ever does, as one from a hub has; --teacher-samples 1000
gives both the same. Augmentation is none, so that the teacher runs once over the images (`feature` apart, which reads
its layers in every step).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arms import INT8, Arm, Benchmark, paired_points, print_table, spread, stage_accuracy

# As published, or as close as one `alpha` for all allows; but dkd's nontarget_weight is 2, as its published 8 did worse
# than kd on val in a trial with 2,000 images.
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"method": "kd", "temperature": 4.0, "alpha": 0.9},
    "dkd": {"method": "dkd", "temperature": 4.0, "alpha": 0.7, "nontarget_weight": 2.0},
    "feature": {"method": "feature", "temperature": 4.0, "alpha": 0.9},
    "relation": {"method": "relation", "temperature": 4.0, "alpha": 0.7},
}


def main() -> None:
    benchmark = Benchmark("distillation", __doc__ or "")
    parser = benchmark.parser
    parser.add_argument("--data", default="fashion_mnist", help="a source of the package; image_folder needs --root")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--size", type=int, default=14, help="side of the images in px")
    parser.add_argument("--teacher-samples", type=int, default=10_000, help="training images of the teacher; 0 for all")
    parser.add_argument("--train-samples", type=int, default=1000, help="training images of the students; 0 for all")
    parser.add_argument("--teacher", default="resnet20")
    parser.add_argument("--teacher-width", type=int, default=16)
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--student", default="student_cnn")
    parser.add_argument("--student-width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    arguments = parser.parse_args()

    def model(name: str, width: int, **more: Any) -> dict[str, Any]:
        sizes = {"preprocessing": {"input_size": arguments.size, "crop_fraction": 1.0}}
        return {"name": name, "arguments": {"width": width}, **sizes, **more}

    def data(samples: int) -> dict[str, Any]:
        root = {"root": str(arguments.root)} if arguments.root else {}
        share = {"max_train_samples": samples} if samples else {}
        return {"name": arguments.data, "val_fraction": 0.02, **root, **share}

    training = {"batch_size": 64, "learning_rate": arguments.learning_rate}
    student = {"data": data(arguments.train_samples), "model": model(arguments.student, arguments.student_width)}
    teacher = Arm(
        "teacher",
        {
            "data": data(arguments.teacher_samples),
            "model": model(arguments.teacher, arguments.teacher_width),
            "stages": [
                {
                    "kind": "train",
                    "id": "teacher",
                    "epochs": arguments.teacher_epochs,
                    "batch_size": 128,
                    "learning_rate": arguments.learning_rate,
                    "augment": {"horizontal_flip": True, "shift_pixels": 1},
                },
                INT8,
            ],
        },
        stage="teacher",
        seeds=1,
    )
    alone = {"kind": "train", "id": "student", "epochs": arguments.epochs, **training}
    arms = [teacher, Arm("student alone", {**student, "stages": [alone, INT8]}, stage="student")]
    source = model(arguments.teacher, arguments.teacher_width, checkpoint="@teacher/teacher")
    for name, settings in METHODS.items():
        stage = {**alone, "kind": "distill", "teacher": {"model": source, **settings}}
        arms.append(Arm(name, {**student, "stages": [stage, INT8]}, stage="student"))

    found = benchmark.run(arguments, arms)
    rows = []
    for arm in arms:
        results = found[arm.name]
        is_taught = arm.name in METHODS
        rows.append(
            (
                arm.name,
                spread(stage_accuracy(results)),
                paired_points(results, found["student alone"]) if is_taught else "",
                paired_points(results, found["kd"]) if is_taught and arm.name != "kd" else "",
                f"{results[0]['params']:,}" if results else "",
                f"{results[0]['macs'] / 1e6:.2f} M" if results else "",
                spread(stage_accuracy(results, "int8")),
                str(len(results)),
            )
        )
    print_table(
        f"Distillation, {arguments.data}: test accuracy in %, last epoch, mean (min to max) over seeds",
        (
            "arm",
            "accuracy",
            "points against alone, paired [95 %]",
            "points against kd, paired [95 %]",
            "params",
            "MACs",
            "int8 accuracy",
            "seeds",
        ),
        rows,
        found,
    )


if __name__ == "__main__":
    main()

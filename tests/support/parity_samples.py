"""Sample 0 of each task in the reference material and its listed exemplar, as paths under shared/samples."""

SAMPLES = {
    "ade20k": ("ade20k/validation/ADE_val_00001232.jpg", "ade20k/training/ADE_train_00004996.jpg"),
    "celebahq": ("celebahq/CelebA-HQ-img/29922.jpg", "celebahq/CelebA-HQ-img/26768.jpg"),
    "celebahqedge": ("celebahqedge/CelebA-HQ-img/22233.jpg", "celebahqedge/CelebA-HQ-img/2994.jpg"),
    "deepfashion": (
        "DeepFashion/img/WOMEN/Dresses/id_00000244/02_1_front.jpg",
        "DeepFashion/img/WOMEN/Tees_Tanks/id_00007059/03_3_back.jpg",
    ),
}

"""The papers' own numbers, beside a run's: ZFNet (arXiv v3), tables 1, 2, 4 to 7; OverFeat, figures 9, 11."""

from __future__ import annotations

CORRESPONDENCE = [
    ["right eye", "0.067 +- 0.007", "0.069 +- 0.015"],
    ["left eye", "0.069 +- 0.007", "0.068 +- 0.013"],
    ["nose", "0.079 +- 0.017", "0.069 +- 0.011"],
    ["random", "0.107 +- 0.017", "0.073 +- 0.014"],
]
"""Table 1: part, mean feature sign change at layer 5 and at layer 7."""

IMAGENET = [
    ["Krizhevsky et al., 1 convnet", "40.7", "18.2"],
    ["Krizhevsky et al., 5 convnets", "38.1", "16.4"],
    ["our replication of Krizhevsky et al., 1 convnet", "40.5", "18.1"],
    ["1 convnet as per figure 3", "38.4", "16.5"],
    ["5 convnets as per figure 3 - (a)", "36.7", "15.3"],
    ["1 convnet, layers 3,4,5: 512,1024,512 maps - (b)", "37.5", "16.0"],
    ["6 convnets, (a) and (b) combined", "36.0", "14.7"],
]
"""Table 2: top-1 and top-5 error of the validation images, in percent."""

CALTECH101 = [
    ["Bo et al.", "–", "81.4 +- 0.33"],
    ["Jianchao et al.", "73.2", "84.3"],
    ["not pretrained", "22.8 +- 1.5", "46.5 +- 1.7"],
    ["pretrained on ImageNet", "83.8 +- 0.5", "86.5 +- 0.5"],
]
"""Table 4: mean accuracy of a class in percent, with 15 and 30 training images of each."""

CALTECH256 = [
    ["Sohn et al.", "35.1", "42.1", "45.7", "47.9"],
    ["Bo et al.", "40.5 +- 0.4", "48.0 +- 0.2", "51.9 +- 0.2", "55.2 +- 0.3"],
    ["not pretrained", "9.0 +- 1.4", "22.5 +- 0.7", "31.2 +- 0.5", "38.8 +- 1.4"],
    ["pretrained on ImageNet", "65.7 +- 0.2", "70.6 +- 0.2", "72.7 +- 0.4", "74.2 +- 0.3"],
]
"""Table 5: the same with 15, 30, 45 and 60."""

PASCAL = [
    ["airplane", "92.0", "97.3", "96.0"],
    ["bicycle", "74.2", "84.2", "77.1"],
    ["bird", "73.0", "80.8", "88.4"],
    ["boat", "77.5", "85.3", "85.5"],
    ["bottle", "54.3", "60.8", "55.8"],
    ["bus", "85.2", "89.9", "85.8"],
    ["car", "81.9", "86.8", "78.6"],
    ["cat", "76.4", "89.3", "91.2"],
    ["chair", "65.2", "75.4", "65.0"],
    ["cow", "63.2", "77.8", "74.4"],
    ["dining table", "63.2", "77.8", "67.7"],
    ["dog", "68.9", "83.0", "87.8"],
    ["horse", "78.2", "87.5", "86.0"],
    ["motorbike", "81.0", "90.1", "85.1"],
    ["person", "91.6", "95.0", "90.9"],
    ["potted plant", "55.9", "57.8", "52.2"],
    ["sheep", "69.4", "79.2", "83.6"],
    ["sofa", "65.4", "73.4", "61.1"],
    ["train", "86.7", "94.5", "91.8"],
    ["tv", "77.4", "80.7", "76.1"],
    ["mean", "74.3", "82.2", "79.0"],
]
"""Table 6: average precision in percent on PASCAL 2012: Sande et al., Yan et al., the paper's own."""

LAYERS = [
    ["SVM (1)", "44.8 +- 0.7", "24.6 +- 0.4"],
    ["SVM (2)", "66.2 +- 0.5", "39.6 +- 0.3"],
    ["SVM (3)", "72.3 +- 0.4", "46.0 +- 0.3"],
    ["SVM (4)", "76.6 +- 0.4", "51.3 +- 0.1"],
    ["SVM (5)", "86.2 +- 0.8", "65.6 +- 0.3"],
    ["SVM (7)", "85.5 +- 0.4", "71.7 +- 0.2"],
    ["Softmax (5)", "82.9 +- 0.4", "65.7 +- 0.5"],
    ["Softmax (7)", "85.4 +- 0.4", "72.6 +- 0.1"],
]
"""Table 7: accuracy on Caltech-101 (30 of each class) and Caltech-256 (60) by classifier and layer."""

LOCALIZATION = [
    ["OverFeat, one regressor, centred crop", "40.0"],
    ["OverFeat, one regressor, 1 scale", "36.0"],
    ["OverFeat, one regressor, 2 scales", "31.5"],
    ["OverFeat, one regressor, 3 scales", "31.3"],
    ["OverFeat, one regressor, 4 scales", "30.0"],
    ["OverFeat, one for each class, 3 scales", "44.1"],
]
"""OverFeat, figure 9: localisation error of the validation images with five guesses, in percent."""

DETECTION = [
    ["OverFeat, after the contest", "24.3"],
    ["UvA", "22.6"],
    ["NEC", "20.9"],
    ["OverFeat, as entered", "19.4"],
    ["Toronto A", "11.5"],
]
"""OverFeat, figure 11: mean average precision over the 200 classes of the test images, in percent."""

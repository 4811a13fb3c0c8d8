// Detections of a package that `dn-detr export --format aoti` has written, without Python; docs/export.md has the build.
//
//     detect out/model_aoti.pt2 dn_detr_d2/_C.abi3.so 480 640 < pixels
//
// It prints the five best pairs of a query and a class as the model gives them, without the NMS that "nms" asks for below 1.
// `pixels` are 480 x 640 x 3 bytes in rows, of an image that is resized and in the channel order that the metadata say.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int count, char** arguments) {
  if (count != 5) {
    std::fprintf(stderr, "usage: %s PACKAGE LIBRARY HEIGHT WIDTH < PIXELS\n", arguments[0]);
    return 2;
  }
  // The package calls our operator, which loading the library registers. RTLD_LAZY: what it wants of Python is not called.
  if (dlopen(arguments[2], RTLD_LAZY | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const auto metadata = model.get_metadata();
  if (metadata.at("outputs").find("\"boxes\"") == std::string::npos) return std::fprintf(stderr, "the model gives no boxes\n"), 1;
  for (const auto& [name, value] : metadata) {
    if (name == "class_names" || name == "resize" || name == "channel_order" || name == "nms") std::printf("%s: %s\n", name.c_str(), value.c_str());
  }

  const int64_t height = std::atoll(arguments[3]), width = std::atoll(arguments[4]);
  std::vector<uint8_t> pixels(3 * height * width);
  if (std::fread(pixels.data(), 1, pixels.size(), stdin) != pixels.size()) return std::fprintf(stderr, "too few pixels\n"), 1;
  const at::Tensor rows = at::from_blob(pixels.data(), {height, width, 3}, at::kByte);
  const at::Tensor images = rows.permute({2, 0, 1}).unsqueeze(0).to(at::kFloat).contiguous();
  const at::Tensor sizes = at::tensor({height, width}, at::kLong).unsqueeze(0);

  const std::vector<at::Tensor> outputs = model.run({images, sizes});  // logits, boxes[, masks]
  const bool softmax = metadata.at("scores") == "\"softmax\"";  // whose last column is "no object"
  const at::Tensor scores = softmax ? outputs[0][0].softmax(-1).slice(-1, 0, -1) : outputs[0][0].sigmoid();
  const auto [best, index] = scores.flatten().topk(std::min<int64_t>(5, scores.numel()));
  for (int64_t i = 0; i < best.size(0); ++i) {
    const int64_t query = index[i].item<int64_t>() / scores.size(1), label = index[i].item<int64_t>() % scores.size(1);
    const at::Tensor box = outputs[1][0][query];  // centre, width, height as parts of the image
    std::printf("class %ld score %.3f box %.4f %.4f %.4f %.4f\n", long(label), best[i].item<float>(), box[0].item<float>(),
                box[1].item<float>(), box[2].item<float>(), box[3].item<float>());
  }
  return 0;
}

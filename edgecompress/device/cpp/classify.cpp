// Classify one image with ONNX Runtime's C++ API: classify BUNDLE IMAGE.npy [fp32|int8]
//
// The image is a .npy file, uint8 [height, width, channels]. Prints the five likeliest classes.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "model_facts.h"

namespace {

struct Image {
  int64_t height = 0, width = 0, channels = 0;
  std::vector<uint8_t> pixels;  // row by row, channels last
};

// NumPy's format 1.0: magic, version, length of the header, the header as a Python dict, the data.
Image read_npy(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (bytes.size() < 10 || std::string(bytes.begin(), bytes.begin() + 6) != "\x93NUMPY" || bytes[6] != 1)
    throw std::runtime_error(path + ": is no .npy file of format 1");
  const size_t length = static_cast<uint8_t>(bytes[8]) | static_cast<uint8_t>(bytes[9]) << 8;
  if (bytes.size() < 10 + length) throw std::runtime_error(path + ": is cut off");
  const std::string header(bytes.begin() + 10, bytes.begin() + 10 + length);
  const size_t shape = header.find("'shape': (");
  if (header.find("'|u1'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos ||
      shape == std::string::npos)
    throw std::runtime_error(path + ": holds no uint8 image");
  long long height = 0, width = 0, channels = 0;
  if (std::sscanf(header.c_str() + shape, "'shape': (%lld, %lld, %lld)", &height, &width, &channels) != 3 ||
      height <= 0 || width <= 0 || channels != kChannels)
    throw std::runtime_error(path + ": the shape must be (height, width, " + std::to_string(kChannels) + ")");
  if (bytes.size() - 10 - length != static_cast<size_t>(height * width * channels))
    throw std::runtime_error(path + ": has another size than its shape");
  return {height, width, channels, {bytes.begin() + 10 + length, bytes.end()}};
}

std::vector<std::string> read_labels(const std::string& path) {
  std::ifstream stream(path);
  std::vector<std::string> labels;
  for (std::string line; std::getline(stream, line);) labels.push_back(line);
  return labels;
}

// Normalized planes, for models that do not read pixels: (x / 255 - mean) / std, [channels, height, width].
std::vector<float> normalized(const Image& image) {
  if (image.height != kInputSize || image.width != kInputSize)
    throw std::runtime_error("this model reads images of " + std::to_string(kInputSize) + " pixels a side only");
  const int64_t area = image.height * image.width;
  std::vector<float> planes(image.pixels.size());
  for (int64_t channel = 0; channel < image.channels; ++channel)
    for (int64_t pixel = 0; pixel < area; ++pixel)
      planes[channel * area + pixel] =
          (image.pixels[pixel * image.channels + channel] / 255.0f - kMean[channel]) / kStd[channel];
  return planes;
}

int run(const std::string& bundle, const std::string& image_path, const std::string& model) {
  Image image = read_npy(image_path);
  const std::string file = model == "fp32" ? kFp32File : model == "int8" ? kInt8File : kDefaultFile;

  Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  Ort::Session session(environment, (bundle + "/" + file).c_str(), options);

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<float> planes;
  Ort::Value input{nullptr};
  if (kReadsPixels) {
    const std::array<int64_t, 4> shape{1, image.height, image.width, image.channels};
    input = Ort::Value::CreateTensor<uint8_t>(memory, image.pixels.data(), image.pixels.size(), shape.data(), 4);
  } else {
    planes = normalized(image);
    const std::array<int64_t, 4> shape{1, image.channels, image.height, image.width};
    input = Ort::Value::CreateTensor<float>(memory, planes.data(), planes.size(), shape.data(), 4);
  }
  const char* inputs[] = {kInput};
  const char* outputs[] = {kOutput};
  auto answers = session.Run(Ort::RunOptions{nullptr}, inputs, &input, 1, outputs, 1);
  const float* logits = answers[0].GetTensorData<float>();
  const size_t classes = answers[0].GetTensorTypeAndShapeInfo().GetElementCount();

  std::vector<size_t> order(classes);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  double sum = 0;
  for (size_t index = 0; index < classes; ++index) sum += std::exp(double{logits[index]} - logits[order[0]]);
  const auto labels = read_labels(bundle + "/" + kLabelsFile);
  for (size_t place = 0; place < std::min<size_t>(5, classes); ++place) {
    const size_t index = order[place];
    const double probability = std::exp(double{logits[index]} - logits[order[0]]) / sum;
    const std::string label = index < labels.size() ? labels[index] : std::to_string(index);
    std::printf("%6.2f%%  %s (class %zu, logit %.6g)\n", 100 * probability, label.c_str(), index, logits[index]);
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: classify BUNDLE IMAGE.npy [fp32|int8]\n");
    return 2;
  }
  try {
    return run(words[1], words[2], count > 3 ? words[3] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

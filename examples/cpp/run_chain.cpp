// Runs an exported model without Python: TorchScript and AOTInductor stages, on the devices that the manifest names.
//
//     run_chain DIRECTORY ROWS
//
// The input is sin(0), sin(1), ... (whole numbers: 0 to 6 in turns). Prints the first result, a number on each line.
// Hashes are checked by lightning_hetero.export.HeteroRuntime, not here.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>

#include "json.hpp"

using Tensors = std::vector<at::Tensor>;
using Run = std::function<Tensors(const Tensors&)>;

static Json read_manifest(const std::filesystem::path& directory) {
  std::ifstream file(directory / "manifest.json");
  if (!file) throw std::runtime_error((directory / "manifest.json").string() + " cannot be read");
  std::stringstream text;
  text << file.rdbuf();
  Json manifest = JsonReader(text.str()).read();
  if (manifest.at("format").text != "lightning_hetero.export" || manifest.at("version").number != 1)
    throw std::runtime_error("the manifest is not one of version 1 of lightning_hetero.export");
  return manifest;
}

// The file of a stage; never one outside of the directory.
static std::string file_of(const std::filesystem::path& directory, const Json& stage) {
  std::filesystem::path name = stage.at("files").list.at(0).at("name").text;
  if (name.empty() || name != name.filename() || name == "..")
    throw std::runtime_error("the manifest names " + name.string() + ", which is not in the directory");
  return (directory / name).string();
}

static Run open_torchscript(const std::string& file, c10::Device device) {
  auto module = std::make_shared<torch::jit::Module>(torch::jit::load(file, device));
  module->eval();
  return [module](const Tensors& inputs) {
    auto result = module->forward(std::vector<c10::IValue>(inputs.begin(), inputs.end()));
    Tensors outputs;
    for (const auto& value : result.toTupleRef().elements()) outputs.push_back(value.toTensor());
    return outputs;
  };
}

static Run open_aoti(const std::string& file, c10::Device device) {
  auto loader = std::make_shared<torch::inductor::AOTIModelPackageLoader>(
      file, "model", false, 1, device.is_cpu() ? -1 : device.index());
  return [loader](const Tensors& inputs) { return loader->run(inputs); };
}

static Run open_stage(const std::filesystem::path& directory, const Json& stage) {
  const std::string& target = stage.at("target").text;
  const auto colon = target.find(':');
  const std::string family = target.substr(0, colon);
  const c10::Device device(colon == std::string::npos ? "cpu" : target.substr(colon + 1));
  const std::string file = file_of(directory, stage);
  Run run;
  if (family == "torchscript") run = open_torchscript(file, device);
  else if (family == "aoti") run = open_aoti(file, device);
  else throw std::runtime_error(
      stage.at("name").text + " is for '" + target + "'; this program runs torchscript and aoti");
  return [run, device](const Tensors& inputs) {
    Tensors here;
    for (const auto& input : inputs) here.push_back(input.to(device));
    return run(here);
  };
}

static at::Tensor example(const Json& value, int64_t rows) {
  std::vector<int64_t> shape;
  int64_t count = 1;
  for (const auto& size : value.at("shape").list) {
    shape.push_back(size.kind == Json::Kind::null ? rows : static_cast<int64_t>(size.number));
    count *= shape.back();
  }
  const at::Tensor numbers = at::arange(count, at::kDouble);
  const std::string& dtype = value.at("dtype").text;
  if (dtype == "float32") return numbers.sin().reshape(shape).to(at::kFloat);
  if (dtype == "int64") return numbers.remainder(7).reshape(shape).to(at::kLong);
  throw std::runtime_error("this program makes float32 and int64 inputs, not " + dtype);
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: run_chain DIRECTORY ROWS\n";
    return 2;
  }
  try {
    c10::InferenceMode guard;
    const std::filesystem::path directory = argv[1];
    const Json manifest = read_manifest(directory);
    std::map<std::string, at::Tensor> values;
    for (const auto& value : manifest.at("inputs").list)
      values[value.at("name").text] = example(value, std::stoll(argv[2]));
    for (const auto& stage : manifest.at("stages").list) {
      const Run run = open_stage(directory, stage);
      Tensors inputs;
      for (const auto& value : stage.at("inputs").list) inputs.push_back(values.at(value.at("name").text));
      const Tensors outputs = run(inputs);
      const auto& names = stage.at("outputs").list;
      for (size_t i = 0; i < names.size(); ++i) values[names[i].at("name").text] = outputs.at(i);
    }
    const auto result = values.at(manifest.at("outputs").list.at(0).at("name").text).to(at::kCPU, at::kDouble).flatten();
    std::cout.precision(9);
    for (int64_t i = 0; i < result.numel(); ++i) std::cout << result[i].item<double>() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "run_chain: " << error.what() << "\n";
    return 1;
  }
  return 0;
}

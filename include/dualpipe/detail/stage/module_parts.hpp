#pragma once

#include <torch/nn/module.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {

/// Holds modules and tensors under names with dots: the layers of a stage, parts of a module, or those below one level of
/// their names.
class ModuleLevel : public torch::nn::Module {
 public:
  explicit ModuleLevel(const std::string& name) : torch::nn::Module(name) {}

  void insert_module(const std::string& path, const std::shared_ptr<torch::nn::Module>& module) {
    const auto [level, name] = level_of(path);
    level->register_module(name, module);
  }
  void insert_parameter(const std::string& path, const at::Tensor& parameter) {
    const auto [level, name] = level_of(path);
    level->register_parameter(name, parameter, parameter.requires_grad());
  }
  void insert_buffer(const std::string& path, const at::Tensor& buffer) {
    const auto [level, name] = level_of(path);
    level->register_buffer(name, buffer);
  }

 private:
  std::pair<ModuleLevel*, std::string> level_of(const std::string& path) {
    const auto dot = path.find('.');
    if (dot == std::string::npos) return {this, path};
    auto& level = levels_[path.substr(0, dot)];
    if (!level) level = register_module(path.substr(0, dot), std::make_shared<ModuleLevel>(name()));
    return level->level_of(path.substr(dot + 1));
  }

  std::map<std::string, std::shared_ptr<ModuleLevel>> levels_;
};

/// Parts of a module, which they do not leave: code of the whole sees train() and eval() too.
class ModuleParts final : public ModuleLevel {
 public:
  explicit ModuleParts(std::shared_ptr<torch::nn::Module> whole)
      : ModuleLevel(whole->name()), whole_(std::move(whole)) {}
  void train(bool on) override {
    whole_->train(on);
    ModuleLevel::train(on);
  }

  /// Once all parts are there: tells their tensors from the others of the whole.
  void complete() {
    std::unordered_set<const at::TensorImpl*> seen;
    const auto is_new = [&](const at::Tensor& tensor) {
      return tensor.defined() && seen.insert(tensor.unsafeGetTensorImpl()).second;
    };
    const auto each = [](const torch::nn::Module& module, const auto& visit) {
      for (const auto& item : module.named_parameters()) visit(item.key(), item.value());
      for (const auto& item : module.named_buffers()) visit(item.key(), item.value());
    };
    each(*this, [&](const std::string&, const at::Tensor& tensor) {
      if (is_new(tensor)) used_.push_back(tensor);
    });
    each(*whole_, [&](const std::string& name, const at::Tensor& tensor) {
      if (is_new(tensor)) unused_.emplace_back(name, tensor);
    });
  }
  const std::vector<at::Tensor>& used() const noexcept { return used_; }
  /// Of the whole, with their names there.
  const std::vector<std::pair<std::string, at::Tensor>>& unused() const noexcept { return unused_; }

 private:
  std::shared_ptr<torch::nn::Module> whole_;
  std::vector<at::Tensor> used_;
  std::vector<std::pair<std::string, at::Tensor>> unused_;
};

/// "a, b, c"
inline std::string names_within(const torch::nn::Module& module) {
  std::string text;
  const auto add = [&](const auto& items) {
    for (const auto& item : items) text += (text.empty() ? "" : ", ") + item.key();
  };
  add(module.named_children());
  add(module.named_parameters(/*recurse=*/false));
  add(module.named_buffers(/*recurse=*/false));
  return text.empty() ? "nothing" : text;
}

/// A module of these parts of another one, under the same names.
///
/// @throws InvalidArgument  no such part; a part twice or inside another one.
inline std::shared_ptr<torch::nn::Module> module_parts(const std::shared_ptr<torch::nn::Module>& whole,
                                                       const std::vector<std::string>& names) {
  for (std::size_t i = 0; i < names.size(); ++i)
    for (std::size_t j = 0; j < names.size(); ++j)
      DUALPIPE_CHECK(i == j || !(names[j] + ".").starts_with(names[i] + "."), "Stage::uses names '", names[j],
                     names[i] == names[j] ? str("' twice") : str("', which is inside of '", names[i], "'"));
  const auto modules = whole->named_modules("", /*include_self=*/false);
  const auto parameters = whole->named_parameters();
  const auto buffers = whole->named_buffers();
  auto parts = std::make_shared<ModuleParts>(whole);
  for (const std::string& name : names) {
    if (const auto* module = modules.find(name))
      parts->insert_module(name, *module);
    else if (const auto* parameter = parameters.find(name))
      parts->insert_parameter(name, *parameter);
    else if (const auto* buffer = buffers.find(name))
      parts->insert_buffer(name, *buffer);
    else
      throw InvalidArgument(
          str("Stage::uses names '", name, "', but the module has no such part; it has ", names_within(*whole)));
  }
  parts->complete();
  return parts;
}

}  // namespace dualpipe::detail

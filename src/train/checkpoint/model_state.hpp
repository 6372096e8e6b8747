#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe {
class DualPipeImpl;
}

namespace dualpipe::detail {

struct NamedState {
  at::Tensor tensor;
  bool is_parameter = true;
};

/// Tensors of one stage, or of a whole module, by name.
struct StageState {
  int number = 0;
  bool is_owned = true;  ///< this rank is the lowest holder
  std::map<std::string, NamedState> tensors;
};

/// What this rank holds of a model.
struct ModelState {
  std::shared_ptr<Communicator> communicator;  ///< null: a module that one process trains
  DualPipeImpl* pipe = nullptr;                ///< null as well then
  std::vector<StageState> stages;
  std::map<const void*, std::string> names;  ///< of each tensor, by TensorImpl; the first where it has several
};

/// @param model  a DualPipeImpl or another module.
ModelState model_state(const torch::nn::Module& model, bool stage_prefix);

/// What ranks tell each other about a tensor.
struct TensorLine {
  std::string name, dtype;
  std::vector<std::int64_t> sizes;
  int stage = 0;
  bool is_parameter = true;
  int group = -1;                   ///< of the optimizer's parameters; -1: none
  std::vector<std::string> fields;  ///< of its optimizer state
};
/// Without group and fields. @throws InvalidArgument  a dtype that checkpoints cannot hold.
TensorLine line_of(const std::string& name, const NamedState& item, int stage);
void to_json(nlohmann::json& json, const TensorLine& line);
void from_json(const nlohmann::json& json, TensorLine& line);
/// "F32 [4, 8]"
std::string shape_text(const std::string& dtype, const std::vector<std::int64_t>& sizes);

/// "a, b, c and 12 more"
std::string listed(const std::vector<std::string>& names);

}  // namespace dualpipe::detail

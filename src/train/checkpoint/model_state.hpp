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
  int part = -1;                       ///< of the experts; -1: all ranks that hold the stage have the same
  std::vector<std::string> also = {};  ///< other names of the tensor in the model: it is saved once, found under any
};

/// Tensors of one stage, or of a whole module, by name.
struct StageState {
  int number = 0;
  std::map<std::string, NamedState> tensors;
};

/// What this rank holds of a model. What stages of several ranks tie is a tensor of the lowest of these stages.
struct ModelState {
  std::shared_ptr<Communicator> communicator;  ///< of all replicas; null: a module that one process trains
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
  int part = -1;
  bool is_parameter = true;
  int group = -1;                   ///< of this rank's optimizer; -1: it does not have the tensor
  std::vector<std::string> fields;  ///< of the state in this rank's optimizer
  std::vector<std::string> also;    ///< as in NamedState
};
/// Without group and fields. @throws InvalidArgument  a dtype that checkpoints cannot hold.
TensorLine line_of(const std::string& name, const NamedState& item, int stage);
void to_json(nlohmann::json& json, const TensorLine& line);
void from_json(const nlohmann::json& json, TensorLine& line);
/// A tensor of the model, as all ranks together have it.
struct WholeTensor : TensorLine {
  int rank = 0;         ///< the lowest that has it
  int state_rank = -1;  ///< the lowest whose optimizer has a state of it, which `fields` lists; -1: none
};
using WholeModel = std::map<std::string, WholeTensor>;

/// The same on every rank.
///
/// @param lines    of each rank.
/// @param numbers  of the ranks, as errors name them.
/// @throws InvalidArgument  a name of several tensors, or a parameter in several groups.
WholeModel whole_model(const std::vector<std::vector<TensorLine>>& lines, const std::vector<int>& numbers);

/// "F32 [4, 8]"
std::string shape_text(const std::string& dtype, const std::vector<std::int64_t>& sizes);

/// "a, b, c and 12 more"
std::string listed(const std::vector<std::string>& names);

}  // namespace dualpipe::detail

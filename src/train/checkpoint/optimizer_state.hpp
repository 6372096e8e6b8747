#pragma once

#include <ATen/core/Tensor.h>
#include <torch/optim/optimizer.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "train/checkpoint/model_state.hpp"

namespace dualpipe::detail {

using StateFields = std::map<std::string, at::Tensor>;  // of one parameter: "exp_avg", "step"

/// How one kind of torch::optim keeps its states and options.
class OptimizerKind {
 public:
  virtual ~OptimizerKind() = default;
  virtual std::string name() const = 0;
  virtual nlohmann::json options(const torch::optim::OptimizerOptions& options) const = 0;
  /// @throws InvalidArgument  a member is missing or has another type; `options` is what it was.
  virtual void set_options(const nlohmann::json& json, torch::optim::OptimizerOptions& options) const = 0;
  virtual StateFields fields(const torch::optim::OptimizerParamState& state) const = 0;
  /// @throws InvalidArgument  a field is missing, unknown, or a step that is no integer.
  virtual std::unique_ptr<torch::optim::OptimizerParamState> state(const StateFields& fields) const = 0;
};

/// @throws InvalidArgument  an optimizer whose states are not known.
std::unique_ptr<OptimizerKind> kind_of(const torch::optim::Optimizer& optimizer);

/// The options of each group, as JSON.
nlohmann::json group_options(const OptimizerKind& kind, const torch::optim::Optimizer& optimizer);
/// The group of each parameter, by TensorImpl.
///
/// @throws InvalidArgument  the optimizer has a parameter that the model does not have.
std::map<const void*, int> group_indices(const torch::optim::Optimizer& optimizer, const ModelState& model);

}  // namespace dualpipe::detail

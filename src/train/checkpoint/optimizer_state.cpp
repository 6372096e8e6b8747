#include "train/checkpoint/optimizer_state.hpp"

#include <ATen/ATen.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace {

namespace optim = torch::optim;
using Json = nlohmann::json;

template <class T, class... Choices>
concept OneOf = (std::is_same_v<std::remove_const_t<T>, Choices> || ...);

// Each visits the members of a state or of options, const or not, with their names in PyTorch.

template <OneOf<optim::SGDParamState> State, class Visit>
void visit_members(State& state, Visit visit) {
  visit("momentum_buffer", state.momentum_buffer());
}
template <OneOf<optim::AdamParamState, optim::AdamWParamState> State, class Visit>
void visit_members(State& state, Visit visit) {
  visit("step", state.step());
  visit("exp_avg", state.exp_avg());
  visit("exp_avg_sq", state.exp_avg_sq());
  visit("max_exp_avg_sq", state.max_exp_avg_sq());
}
template <OneOf<optim::AdagradParamState> State, class Visit>
void visit_members(State& state, Visit visit) {
  visit("step", state.step());
  visit("sum", state.sum());
}
template <OneOf<optim::RMSpropParamState> State, class Visit>
void visit_members(State& state, Visit visit) {
  visit("step", state.step());
  visit("square_avg", state.square_avg());
  visit("momentum_buffer", state.momentum_buffer());
  visit("grad_avg", state.grad_avg());
}

template <OneOf<optim::SGDOptions> Options, class Visit>
void visit_members(Options& options, Visit visit) {
  visit("lr", options.lr());
  visit("momentum", options.momentum());
  visit("dampening", options.dampening());
  visit("weight_decay", options.weight_decay());
  visit("nesterov", options.nesterov());
}
template <OneOf<optim::AdamOptions, optim::AdamWOptions> Options, class Visit>
void visit_members(Options& options, Visit visit) {
  visit("lr", options.lr());
  visit("betas", options.betas());
  visit("eps", options.eps());
  visit("weight_decay", options.weight_decay());
  visit("amsgrad", options.amsgrad());
}
template <OneOf<optim::AdagradOptions> Options, class Visit>
void visit_members(Options& options, Visit visit) {
  visit("lr", options.lr());
  visit("lr_decay", options.lr_decay());
  visit("weight_decay", options.weight_decay());
  visit("initial_accumulator_value", options.initial_accumulator_value());
  visit("eps", options.eps());
}
template <OneOf<optim::RMSpropOptions> Options, class Visit>
void visit_members(Options& options, Visit visit) {
  visit("lr", options.lr());
  visit("alpha", options.alpha());
  visit("eps", options.eps());
  visit("weight_decay", options.weight_decay());
  visit("momentum", options.momentum());
  visit("centered", options.centered());
}

template <class Options, class State>
class KnownKind final : public OptimizerKind {
 public:
  explicit KnownKind(std::string name) : name_(std::move(name)) {}

  std::string name() const override { return name_; }

  Json options(const optim::OptimizerOptions& options) const override {
    Json json = Json::object();
    visit_members(static_cast<const Options&>(options),
                  [&](const char* name, const auto& value) { json[name] = value; });
    return json;
  }

  void set_options(const Json& json, optim::OptimizerOptions& options) const override {
    Options read = static_cast<const Options&>(options);
    try {
      visit_members(read, [&](const char* name, auto& value) { json.at(name).get_to(value); });
    } catch (const Json::exception& error) {
      throw InvalidArgument(str("options of ", name_, " that do not fit: ", error.what()));
    }
    static_cast<Options&>(options) = read;
  }

  StateFields fields(const optim::OptimizerParamState& state) const override {
    StateFields fields;
    visit_members(static_cast<const State&>(state), [&](const char* name, const auto& value) {
      if constexpr (std::is_integral_v<std::remove_cvref_t<decltype(value)>>) {
        fields[name] = at::scalar_tensor(value, at::kLong);
      } else if (value.defined()) {
        fields[name] = value;
      }
    });
    return fields;
  }

  std::unique_ptr<optim::OptimizerParamState> state(const StateFields& fields) const override {
    auto state = std::make_unique<State>();
    std::size_t used = 0;
    visit_members(*state, [&](const char* name, auto& value) {
      const auto found = fields.find(name);
      if (found != fields.end()) ++used;
      if constexpr (std::is_integral_v<std::remove_cvref_t<decltype(value)>>) {
        DUALPIPE_CHECK(found != fields.end() && found->second.scalar_type() == at::kLong && found->second.numel() == 1,
                       "the state ", name, " of ", name_, " must be one integer");
        value = found->second.template item<std::int64_t>();
      } else if (found != fields.end()) {
        value = found->second;
      }
    });
    for (const auto& field : fields)
      DUALPIPE_CHECK(used == fields.size(), name_, " does not know all states of a parameter, one is ", field.first);
    return state;
  }

 private:
  std::string name_;
};

}  // namespace

std::unique_ptr<OptimizerKind> kind_of(const optim::Optimizer& optimizer) {
  const auto is = [&](auto* type) { return dynamic_cast<decltype(type)>(&optimizer) != nullptr; };
  if (is(static_cast<const optim::SGD*>(nullptr)))
    return std::make_unique<KnownKind<optim::SGDOptions, optim::SGDParamState>>("SGD");
  if (is(static_cast<const optim::Adam*>(nullptr)))
    return std::make_unique<KnownKind<optim::AdamOptions, optim::AdamParamState>>("Adam");
  if (is(static_cast<const optim::AdamW*>(nullptr)))
    return std::make_unique<KnownKind<optim::AdamWOptions, optim::AdamWParamState>>("AdamW");
  if (is(static_cast<const optim::Adagrad*>(nullptr)))
    return std::make_unique<KnownKind<optim::AdagradOptions, optim::AdagradParamState>>("Adagrad");
  if (is(static_cast<const optim::RMSprop*>(nullptr)))
    return std::make_unique<KnownKind<optim::RMSpropOptions, optim::RMSpropParamState>>("RMSprop");
  throw InvalidArgument(
      "checkpoints know torch::optim's SGD, Adam, AdamW, Adagrad and RMSprop, this optimizer is none of them");
}

Json group_options(const OptimizerKind& kind, const optim::Optimizer& optimizer) {
  Json groups = Json::array();
  for (const auto& group : optimizer.param_groups())
    groups.push_back(kind.options(group.has_options() ? group.options() : optimizer.defaults()));
  return groups;
}

std::map<const void*, int> group_indices(const optim::Optimizer& optimizer, const ModelState& model) {
  std::map<const void*, int> indices;
  int index = 0;
  for (const auto& group : optimizer.param_groups()) {
    for (const at::Tensor& parameter : group.params()) {
      DUALPIPE_CHECK(model.names.contains(parameter.unsafeGetTensorImpl()), "the optimizer has a parameter of sizes ",
                     parameter.sizes(), " that is none of the model's; make the optimizer from model->parameters()");
      indices[parameter.unsafeGetTensorImpl()] = index;
    }
    ++index;
  }
  return indices;
}

}  // namespace dualpipe::detail

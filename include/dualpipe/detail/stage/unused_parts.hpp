#pragma once

#include <ATen/record_function.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe::detail {

/// Notices operations of the calling thread that take a parameter or buffer which is in a stage's whole module, but not
/// among the parts that the stage uses. Gradients would not show it: a frozen weight has none, nor has an evaluation.
class UnusedPartsWatch {
 public:
  /// @param used  empty: it watches nothing, and costs nothing.
  explicit UnusedPartsWatch(const std::vector<UsedParts>& used) {
    if (used.empty()) return;
    state_ = std::make_shared<State>();
    for (const UsedParts& each : used)
      each_tensor(*each.whole, [&](const auto& name, const auto* memory) { state_->unused.try_emplace(memory, name); });
    for (const UsedParts& each : used)
      each_tensor(*each.parts, [&](const auto&, const auto* memory) { state_->unused.erase(memory); });
    guard_.emplace(kind(), state_);
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&look).needsInputs(true));
  }
  ~UnusedPartsWatch() {
    if (handle_) at::removeCallback(*handle_);
  }
  UnusedPartsWatch(const UnusedPartsWatch&) = delete;
  UnusedPartsWatch& operator=(const UnusedPartsWatch&) = delete;

  /// @throws InvalidArgument  `body` uses such a tensor, whatever else it throws: another device may be the consequence.
  template <class Body>
  void watch(int stage, const Body& body) const {
    try {
      body();
    } catch (...) {
      check(stage);
      throw;
    }
    check(stage);
  }

 private:
  void check(int stage) const {
    DUALPIPE_CHECK(!state_ || state_->found.empty(), "stage ", stage, ", its loss included, uses '", state_->found,
                   "' of its module, but Stage::uses does not name it, nor a part that it is in. So it is not trained, "
                   "and it is none of the pipeline's weights that are made equal on all ranks, saved and loaded; name "
                   "it in uses()");
  }

  /// What the callback, a plain function, finds by way of the thread.
  struct State final : c10::DebugInfoBase {
    std::unordered_map<const c10::StorageImpl*, std::string> unused;  // names, by memory: views have the same
    std::string found;
  };

  static c10::DebugInfoKind kind() { return c10::DebugInfoKind::PRODUCER_INFO; }

  template <class Visit>
  static void each_tensor(const torch::nn::Module& module, const Visit& visit) {
    const auto go = [&](const auto& items) {
      for (const auto& item : items)
        if (item.value().defined() && item.value().has_storage())
          visit(item.key(), item.value().storage().unsafeGetStorageImpl());
    };
    go(module.named_parameters());
    go(module.named_buffers());
  }

  static void look_at(State& state, const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.has_storage()) return;
    const auto found = state.unused.find(tensor.storage().unsafeGetStorageImpl());
    if (found != state.unused.end()) state.found = found->second;
  }
  static std::unique_ptr<at::ObserverContext> look(const at::RecordFunction& operation) {
    auto* const state = dynamic_cast<State*>(c10::ThreadLocalDebugInfo::get(kind()));
    if (state == nullptr || !state->found.empty()) return nullptr;
    for (const c10::IValue& input : operation.inputs()) {
      if (input.isTensor()) {
        look_at(*state, input.toTensor());
      } else if (input.isList()) {
        for (const c10::IValue& item : input.toListRef())
          if (item.isTensor()) look_at(*state, item.toTensor());
      }
    }
    return nullptr;
  }

  std::shared_ptr<State> state_;
  std::optional<c10::DebugInfoGuard> guard_;
  std::optional<at::CallbackHandle> handle_;
};

}  // namespace dualpipe::detail

#pragma once

#include <ATen/record_function.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <c10/util/flat_hash_map.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/detail/stage/module_parts.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe::detail {

#ifdef NDEBUG
inline c10::ArrayRef<const c10::IValue> inputs_of(const at::RecordFunction& operation) { return operation.inputs(); }
#else
// Without NDEBUG, inputs() first reads a flag that is there only if LibTorch was compiled without it too, and as a rule
// it was not. So the member behind it is read. An explicit instantiation may name it (C++20, [temp.spec.general]).
template <auto member>
struct InputsOf {
  friend c10::ArrayRef<const c10::IValue> inputs_of(const at::RecordFunction& operation) { return operation.*member; }
};
c10::ArrayRef<const c10::IValue> inputs_of(const at::RecordFunction& operation);
template struct InputsOf<&at::RecordFunction::inputs_>;
#endif

/// Notices operations of the calling thread that take a parameter or buffer which is in a stage's whole module, but not
/// among the parts that the stage uses. Gradients would not show it: a frozen weight has none, nor has an evaluation.
class UnusedPartsWatch {
 public:
  /// @param used  empty: it watches nothing, and costs nothing.
  explicit UnusedPartsWatch(const std::vector<UsedParts>& used) {
    if (used.empty()) return;
    state_ = std::make_shared<State>();
    std::vector<const ModuleParts*> all;
    for (const UsedParts& each : used)
      if (const auto* parts = dynamic_cast<const ModuleParts*>(each.parts.get())) all.push_back(parts);
    state_->parts = used;
    for (const ModuleParts* parts : all)
      for (const auto& [name, tensor] : parts->unused())
        if (tensor.has_storage()) state_->unused.emplace(tensor.storage().unsafeGetStorageImpl(), &name);
    for (const ModuleParts* parts : all)
      for (const at::Tensor& tensor : parts->used())
        if (tensor.has_storage()) state_->unused.erase(tensor.storage().unsafeGetStorageImpl());
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
    std::vector<UsedParts> parts;                                            // keeps the names
    ska::flat_hash_map<const c10::StorageImpl*, const std::string*> unused;  // names, by memory: views have the same
    std::string found;
  };

  static c10::DebugInfoKind kind() { return c10::DebugInfoKind::PRODUCER_INFO; }

  static void look_at(State& state, const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.has_storage()) return;
    const auto found = state.unused.find(tensor.storage().unsafeGetStorageImpl());
    if (found != state.unused.end()) state.found = *found->second;
  }
  static std::unique_ptr<at::ObserverContext> look(const at::RecordFunction& operation) {
    auto* const state = dynamic_cast<State*>(c10::ThreadLocalDebugInfo::get(kind()));
    if (state == nullptr || !state->found.empty()) return nullptr;
    for (const c10::IValue& input : inputs_of(operation)) {
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

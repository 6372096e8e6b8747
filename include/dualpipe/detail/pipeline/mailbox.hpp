#pragma once

#include <compare>
#include <map>
#include <utility>

#include "dualpipe/comm/pending.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::detail {

/// What one rank has computed or received and has not used or sent yet: outputs of forwards, input gradients of
/// backwards. It makes no difference whether producer and consumer are on this rank or on another.
class Mailbox {
 public:
  struct Key {
    Payload payload = Payload::activation;
    int stage = 0;  ///< that produced it
    int micro_batch = 0;
    auto operator<=>(const Key&) const = default;
  };
  static Key key_of(const Transfer& transfer) { return {transfer.payload, transfer.stage, transfer.micro_batch}; }

  void put(const Key& key, Tensors tensors) { waiting_[key] = std::move(tensors); }
  bool has(const Key& key) const { return waiting_.contains(key); }
  /// It is there.
  Tensors take(const Key& key) { return std::move(waiting_.extract(key).mapped()); }

 private:
  std::map<Key, Tensors> waiting_;
};

}  // namespace dualpipe::detail

#pragma once

#include <c10/util/Exception.h>

#include <map>
#include <utility>

namespace dualpipe::detail {

/// What waits to be taken, each once.
template <class Key, class Value>
class Store {
 public:
  void put(const Key& key, Value value) { waiting_[key] = std::move(value); }
  bool has(const Key& key) const { return waiting_.contains(key); }
  /// It is there: the program was proven to make it before.
  Value take(const Key& key) {
    auto found = waiting_.extract(key);
    TORCH_INTERNAL_ASSERT(!found.empty());
    return std::move(found.mapped());
  }

 private:
  std::map<Key, Value> waiting_;
};

}  // namespace dualpipe::detail

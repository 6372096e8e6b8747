#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

namespace dualpipe::detail {

/// Values that ranks share that are threads of one process, so that each is made and held once. Any thread.
class SharedValues {
 public:
  /// The value of `key`: what `make` returns, or what it has returned for another rank that still holds it. Others that
  /// ask meanwhile wait, so `make` does not communicate.
  template <class T, class Make>
  std::shared_ptr<const T> get(const std::string& key, const Make& make) {
    const std::shared_ptr<Slot> slot = slot_of(key);
    const std::lock_guard lock(slot->mutex);
    auto value = std::static_pointer_cast<const T>(slot->value.lock());
    if (value == nullptr) slot->value = value = std::make_shared<const T>(make());
    return value;
  }

 private:
  struct Slot {
    std::mutex mutex;
    std::weak_ptr<const void> value;
  };

  std::shared_ptr<Slot> slot_of(const std::string& key) {
    const std::lock_guard lock(mutex_);
    // Nobody uses these, and nobody can begin to meanwhile.
    std::erase_if(slots_, [](const auto& entry) {
      if (entry.second.use_count() != 1) return false;
      const std::lock_guard last_use(entry.second->mutex);  // a count that is read orders nothing
      return entry.second->value.expired();
    });
    std::shared_ptr<Slot>& slot = slots_[key];
    if (slot == nullptr) slot = std::make_shared<Slot>();
    return slot;
  }

  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Slot>> slots_;
};

}  // namespace dualpipe::detail

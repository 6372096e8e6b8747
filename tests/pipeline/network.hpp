#pragma once

#include <chrono>
#include <memory>
#include <utility>

#include "dualpipe/testing/communicators.hpp"

namespace dualpipe::test {

enum class Network { direct, serial, delayed };

/// `inner` as it is, with one transfer at a time, or with links that take `delay` for each message.
inline std::shared_ptr<Communicator> over(Network network, std::shared_ptr<Communicator> inner,
                                          std::chrono::microseconds delay = std::chrono::microseconds(500)) {
  if (network == Network::serial) return testing::serial(std::move(inner));
  if (network == Network::delayed) return testing::delayed_links(std::move(inner), {delay, 1e8});
  return inner;
}

}  // namespace dualpipe::test

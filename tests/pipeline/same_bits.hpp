#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <mutex>
#include <string>

namespace dualpipe::test {

/// Expects the same bits under one name on all ranks, which are threads.
class SameBits {
 public:
  void expect(const std::string& name, const at::Tensor& tensor) {
    const std::lock_guard lock(mutex_);
    const auto [first, is_new] = first_.try_emplace(name, tensor.detach().clone());
    EXPECT_TRUE(torch::equal(first->second, tensor)) << name;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, at::Tensor> first_;
};

}  // namespace dualpipe::test

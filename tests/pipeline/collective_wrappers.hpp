#pragma once

#include <any>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/stage/collective.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe::test {

/// Passes all calls on.
class ForwardingCollective : public Collective {
 public:
  explicit ForwardingCollective(std::shared_ptr<Collective> inner) : inner_(std::move(inner)) {}
  std::any prepare(const Tensors& inputs) override { return inner_->prepare(inputs); }
  Launched forward(Tensors inputs, const StageContext& context) override {
    return inner_->forward(std::move(inputs), context);
  }
  Pending backward(std::shared_ptr<void> handle, Tensors gradients) override {
    return inner_->backward(std::move(handle), std::move(gradients));
  }

 private:
  std::shared_ptr<Collective> inner_;
};

/// Notes what a rank launches, in order: "dispatch0 F3" is its forward for micro-batch 3.
class LoggedCollective final : public ForwardingCollective {
 public:
  LoggedCollective(std::shared_ptr<Collective> inner, std::string name, std::vector<std::string>& log)
      : ForwardingCollective(std::move(inner)), name_(std::move(name)), log_(log) {}
  Launched forward(Tensors inputs, const StageContext& context) override {
    log_.push_back(name_ + " F" + std::to_string(context.micro_batch));
    Launched launched = ForwardingCollective::forward(std::move(inputs), context);
    launched.handle = std::make_shared<Handle>(Handle{std::move(launched.handle), context.micro_batch});
    return launched;
  }
  Pending backward(std::shared_ptr<void> handle, Tensors gradients) override {
    const auto mine = std::static_pointer_cast<Handle>(std::move(handle));
    log_.push_back(name_ + " B" + std::to_string(mine->micro_batch));
    return ForwardingCollective::backward(mine->inner, std::move(gradients));
  }

 private:
  struct Handle {
    std::shared_ptr<void> inner;
    int micro_batch;
  };
  std::string name_;
  std::vector<std::string>& log_;
};

}  // namespace dualpipe::test

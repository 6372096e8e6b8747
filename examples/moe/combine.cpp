#include "combine.hpp"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <utility>

#include "dualpipe/error.hpp"
#include "dualpipe/pipeline/group_collectives.hpp"

namespace moe {
namespace {

using dualpipe::Pending;
using dualpipe::Tensors;

class Combine final : public dualpipe::Collective {
 public:
  explicit Combine(std::shared_ptr<dualpipe::Communicator> group) : exchange_(dualpipe::all_to_all(std::move(group))) {}

  Launched forward(Tensors inputs, const dualpipe::StageContext& context) override {
    DUALPIPE_CHECK(inputs.size() == 4, "combine moves x, rows, token and splits; it is given ", inputs.size(),
                   " tensors");
    auto handle = std::make_shared<Handle>();
    handle->token = inputs[2];
    auto [pending, inner] = exchange_->forward({inputs[1], inputs[3]}, context);
    handle->inner = std::move(inner);
    auto add = [x = inputs[0], token = inputs[2]](std::vector<Tensors> results) -> Tensors {
      const c10::NoGradGuard no_grad;
      const at::Tensor& rows = results[0][0];
      at::Tensor sum = x.flatten(0, -2).index_add(0, token, rows).view(x.sizes());
      return {sum.set_requires_grad(x.requires_grad() || rows.requires_grad()), {}, {}, {}};
    };
    return {dualpipe::join({std::move(pending)}, std::move(add)), std::move(handle)};
  }

  Pending backward(std::shared_ptr<void> handle, Tensors output_gradients) override {
    const auto kept = std::static_pointer_cast<Handle>(std::move(handle));
    const at::Tensor gradient = std::move(output_gradients[0]);
    at::Tensor of_rows;
    if (gradient.defined()) of_rows = gradient.flatten(0, -2).index_select(0, kept->token);
    Pending pending = exchange_->backward(std::move(kept->inner), {std::move(of_rows), {}});
    return dualpipe::join({std::move(pending)}, [gradient](std::vector<Tensors> results) -> Tensors {
      return {gradient, std::move(results[0][0]), {}, {}};
    });
  }

 private:
  struct Handle {
    at::Tensor token;
    std::shared_ptr<void> inner;
  };
  std::shared_ptr<dualpipe::Collective> exchange_;
};

}  // namespace

std::shared_ptr<dualpipe::Collective> combine(std::shared_ptr<dualpipe::Communicator> group) {
  return std::make_shared<Combine>(std::move(group));
}

}  // namespace moe

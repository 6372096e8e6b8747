#include "dualpipe/stage/collective.hpp"

#include <algorithm>
#include <utility>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace {

class Joined final : public Pending::State {
 public:
  Joined(std::vector<Pending> parts, std::function<Tensors(std::vector<Tensors>)> finish)
      : parts_(std::move(parts)), finish_(std::move(finish)) {}

  void wait() override {
    for (Pending& part : parts_) part.wait();
  }
  bool done() const override {
    return std::all_of(parts_.begin(), parts_.end(), [](const Pending& part) { return part.done(); });
  }
  Tensors take() override {
    DUALPIPE_CHECK(finish_ != nullptr, "the tensors of this operation were taken before");
    std::vector<Tensors> results;
    for (Pending& part : parts_) results.push_back(part.take());
    return std::exchange(finish_, nullptr)(std::move(results));
  }
  Span span() const override {
    if (parts_.empty()) return {};
    Span all = parts_.front().span();
    for (const Pending& part : parts_) {
      const Span span = part.span();
      all = {std::min(all.begin, span.begin), std::max(all.end, span.end)};
    }
    return all;
  }

 private:
  std::vector<Pending> parts_;
  std::function<Tensors(std::vector<Tensors>)> finish_;
};

}  // namespace

Pending join(std::vector<Pending> parts, std::function<Tensors(std::vector<Tensors>)> finish) {
  DUALPIPE_CHECK(finish != nullptr, "join needs a function that makes the result");
  return Pending(std::make_shared<Joined>(std::move(parts), std::move(finish)));
}

}  // namespace dualpipe

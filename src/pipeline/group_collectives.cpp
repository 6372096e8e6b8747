#include "dualpipe/pipeline/group_collectives.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

namespace dualpipe {
namespace {

using Rows = std::vector<std::int64_t>;  // by rank

std::string list(const Rows& rows) {
  std::string text = "[";
  for (const std::int64_t count : rows) text += (text.size() > 1 ? ", " : "") + std::to_string(count);
  return text + "]";
}

std::string show(const at::Tensor& tensor) { return to_string(signature_of({tensor})); }

/// What one moved tensor leaves for its backward.
struct Kept {
  bool differentiable = false;       // floating point, and defined: the same on all ranks
  bool own_gradient = false;         // of this rank's input
  std::vector<bool> wants_gradient;  // by rank: the part that came from there requires grad
  Rows sent, received;               // rows
  at::TensorOptions options;
  std::vector<std::int64_t> row;  // sizes of one row of the input

  std::vector<std::int64_t> sizes(std::int64_t rows) const {
    std::vector<std::int64_t> all{rows};
    all.insert(all.end(), row.begin(), row.end());
    return all;
  }
  at::Tensor zeros(std::int64_t rows) const { return at::zeros(sizes(rows), options); }
  TensorSignature signature(std::int64_t rows) const {
    return {.dtype = options.dtype().toScalarType(), .sizes = sizes(rows)};
  }
  /// What each rank sends back: the gradient of what went there, nothing where this rank's input has none.
  Signature returned() const {
    Signature all;
    for (const std::int64_t rows : sent)
      all.push_back(own_gradient ? signature(rows) : TensorSignature{.defined = false, .sizes = {}});
    return all;
  }
};
using Handle = std::vector<Kept>;

Kept kept_of(const at::Tensor& input) {
  Kept kept;
  if (!input.defined()) return kept;
  kept.differentiable = input.is_floating_point() || input.is_complex();
  kept.own_gradient = input.requires_grad();
  kept.options = input.options().requires_grad(false);
  if (input.dim() > 0) kept.row = input.sizes().slice(1).vec();
  return kept;
}

/// What came from all ranks must fit what this rank has itself.
void check_parts(const char* what, std::size_t index, const Tensors& parts, std::size_t me) {
  const at::Tensor& own = parts[me];
  for (std::size_t r = 0; r < parts.size(); ++r) {
    const at::Tensor& part = parts[r];
    const bool fits = part.defined() == own.defined() &&
                      (!own.defined() || (part.scalar_type() == own.scalar_type() && part.dim() == own.dim() &&
                                          part.sizes().slice(1) == own.sizes().slice(1)));
    DUALPIPE_CHECK(fits, what, ": ranks of the group disagree about tensor ", index, ": rank ", me, " moves ",
                   show(own), ", rank ", r, " moves ", show(part),
                   "; only the number of rows, the first dimension, may differ");
  }
}

void check_rows(const char* what, std::size_t index, const at::Tensor& tensor) {
  DUALPIPE_CHECK(!tensor.defined() || tensor.dim() > 0, what, " moves rows, but tensor ", index, " has no dimensions");
}

Rows rows_of(const Tensors& parts) {
  Rows rows;
  for (const at::Tensor& part : parts) rows.push_back(part.defined() ? part.size(0) : 0);
  return rows;
}

/// Parts of one tensor, each with its requires_grad.
Tensors cut(const at::Tensor& tensor, const Rows& rows) {
  if (!tensor.defined()) return Tensors(rows.size());
  const at::NoGradGuard no_grad;
  Tensors parts = tensor.detach().split_with_sizes(rows, 0);
  for (at::Tensor& part : parts) part = part.detach().set_requires_grad(tensor.requires_grad());
  return parts;
}

/// Notes who wants a gradient, before autograd is told that what becomes of the parts is a new tensor.
void note(Kept& kept, const Tensors& parts) {
  kept.received = rows_of(parts);
  kept.wants_gradient.clear();
  for (const at::Tensor& part : parts) kept.wants_gradient.push_back(part.defined() && part.requires_grad());
}

at::Tensor finished(at::Tensor tensor, const Kept& kept) {
  bool requires_grad = false;
  for (const bool wanted : kept.wants_gradient) requires_grad = requires_grad || wanted;
  return tensor.defined() ? tensor.set_requires_grad(requires_grad) : tensor;
}

at::Tensor concatenated(const Tensors& parts) {
  const at::NoGradGuard no_grad;
  return parts.front().defined() ? at::cat(parts) : at::Tensor();
}

/// In rank order; undefined ones count as zeros. `parts` belong to nobody else.
at::Tensor summed(Tensors parts) {
  const at::NoGradGuard no_grad;
  at::Tensor sum;
  for (at::Tensor& part : parts) {
    if (!part.defined()) continue;
    part = part.detach();
    sum = sum.defined() ? sum.add_(part) : part;
  }
  return sum;
}

/// The gradient of what went to each rank.
at::Tensor returned(const Kept& kept, const Tensors& parts) {
  if (!kept.own_gradient) return {};
  const at::NoGradGuard no_grad;
  return at::cat(parts);
}

/// Cuts an output's gradient into what each rank's part gets: zeros where nothing flows in, so that all know what
/// comes, and nothing where the part has no gradient.
Tensors gradient_parts(const at::Tensor& gradient, const Kept& kept) {
  Tensors parts = cut(gradient, kept.received);
  for (std::size_t r = 0; r < parts.size(); ++r) {
    if (!kept.wants_gradient[r]) {
      parts[r] = at::Tensor();
    } else if (!parts[r].defined()) {
      parts[r] = kept.zeros(kept.received[r]);
    }
  }
  return parts;
}

class GroupCollective : public Collective {
 public:
  explicit GroupCollective(std::shared_ptr<Communicator> group, const char* name)
      : group_(std::move(group)), name_(name) {
    DUALPIPE_CHECK(group_ != nullptr, name_, " needs the communicator of a group, got null");
  }

  Pending backward(std::shared_ptr<void> handle, Tensors output_gradients) final {
    auto kept = std::static_pointer_cast<Handle>(std::move(handle));
    std::vector<Pending> parts;
    std::vector<std::size_t> places;
    const std::size_t count = output_gradients.size();
    for (std::size_t i = 0; i < kept->size(); ++i) {
      if (!(*kept)[i].differentiable) continue;
      parts.push_back(launch_backward((*kept)[i], std::move(output_gradients[i])));
      places.push_back(i);
    }
    return join(std::move(parts),
                [this, kept = std::move(kept), places = std::move(places), count](std::vector<Tensors> results) {
                  Tensors gradients(count);
                  for (std::size_t k = 0; k < places.size(); ++k)
                    gradients[places[k]] = finish_backward((*kept)[places[k]], std::move(results[k]));
                  return gradients;
                });
  }

 protected:
  virtual Pending launch_backward(const Kept& kept, at::Tensor gradient) = 0;
  virtual at::Tensor finish_backward(const Kept& kept, Tensors parts) = 0;

  Communicator& group() { return *group_; }
  std::size_t size() const { return static_cast<std::size_t>(group_->size()); }
  std::size_t me() const { return static_cast<std::size_t>(group_->rank()); }
  const char* name() const { return name_; }

 private:
  std::shared_ptr<Communicator> group_;
  const char* name_;
};

class AllToAll final : public GroupCollective {
 public:
  explicit AllToAll(std::shared_ptr<Communicator> group) : GroupCollective(std::move(group), "all_to_all") {}

  Launched forward(Tensors inputs, const StageContext&) override {
    DUALPIPE_CHECK(inputs.size() >= 2, "all_to_all moves tensors and, as the last of them, their splits; it is given ",
                   inputs.size());
    const at::Tensor splits = std::move(inputs.back());
    inputs.pop_back();
    const auto [sent, expected] = read(splits);

    auto kept = std::make_shared<Handle>();
    std::vector<Pending> parts;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      check_rows(name(), i, inputs[i]);
      const std::int64_t rows = std::accumulate(sent.begin(), sent.end(), std::int64_t{0});
      DUALPIPE_CHECK(!inputs[i].defined() || inputs[i].size(0) == rows, "all_to_all: the splits ", list(sent),
                     " add up to ", rows, " rows, but tensor ", i, " is ", show(inputs[i]));
      kept->push_back(kept_of(inputs[i]));
      kept->back().sent = sent;
      parts.push_back(group().all_to_all(cut(inputs[i], sent)));
    }
    auto finish = [this, kept, expected = expected, sent = sent,
                   device = splits.device()](std::vector<Tensors> results) {
      std::optional<Rows> came = expected;
      Tensors outputs;
      for (std::size_t i = 0; i < results.size(); ++i) {
        check_parts(name(), i, results[i], me());
        note((*kept)[i], results[i]);
        if (results[i].front().defined()) {
          const Rows& rows = (*kept)[i].received;
          if (!came) came = rows;
          DUALPIPE_CHECK(*came == rows, "all_to_all: rank ", me(), " of the group ",
                         expected ? "expects by its splits " : "got with the first tensor ", list(*came),
                         " rows from the ranks of the group, but tensor ", i, " came with ", list(rows));
        }
        outputs.push_back(finished(concatenated(results[i]), (*kept)[i]));
      }
      outputs.push_back(at::stack({at::tensor(came.value_or(Rows(size()))), at::tensor(sent)}).to(device));
      return outputs;
    };
    Pending pending = join(std::move(parts), std::move(finish));
    return {std::move(pending), std::move(kept)};
  }

 private:
  /// Rows to each rank, and from each where they are known.
  std::pair<Rows, std::optional<Rows>> read(const at::Tensor& splits) const {
    const auto columns = static_cast<std::int64_t>(size());
    DUALPIPE_CHECK(splits.defined() && at::isIntegralType(splits.scalar_type(), false) &&
                       (splits.sizes() == at::IntArrayRef{columns} || splits.sizes() == at::IntArrayRef{2, columns}),
                   "all_to_all: the last tensor moved must be integer splits of sizes [", columns, "] or [2, ", columns,
                   "], one number for each rank of the group; got ", show(splits));
    const at::Tensor host = splits.detach().to(at::kCPU, at::kLong).contiguous();
    const std::int64_t* values = host.const_data_ptr<std::int64_t>();
    const Rows sent(values, values + columns);
    for (const std::int64_t rows : sent)
      DUALPIPE_CHECK(rows >= 0, "all_to_all: splits are numbers of rows, got ", list(sent));
    if (host.dim() == 1) return {sent, std::nullopt};
    return {sent, Rows(values + columns, values + 2 * columns)};
  }

  Pending launch_backward(const Kept& kept, at::Tensor gradient) override {
    return group().all_to_all(gradient_parts(gradient, kept), kept.returned());
  }
  at::Tensor finish_backward(const Kept& kept, Tensors parts) override { return returned(kept, parts); }
};

class AllGather final : public GroupCollective {
 public:
  explicit AllGather(std::shared_ptr<Communicator> group) : GroupCollective(std::move(group), "all_gather") {}

  Launched forward(Tensors inputs, const StageContext&) override {
    auto kept = std::make_shared<Handle>();
    std::vector<Pending> parts;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      check_rows(name(), i, inputs[i]);
      kept->push_back(kept_of(inputs[i]));
      kept->back().sent = Rows(size(), inputs[i].defined() ? inputs[i].size(0) : 0);
      parts.push_back(group().all_gather(std::move(inputs[i])));
    }
    auto finish = [this, kept](std::vector<Tensors> results) {
      Tensors outputs;
      for (std::size_t i = 0; i < results.size(); ++i) {
        check_parts(name(), i, results[i], me());
        note((*kept)[i], results[i]);
        outputs.push_back(finished(concatenated(results[i]), (*kept)[i]));
      }
      return outputs;
    };
    Pending pending = join(std::move(parts), std::move(finish));
    return {std::move(pending), std::move(kept)};
  }

 private:
  Pending launch_backward(const Kept& kept, at::Tensor gradient) override {
    return group().all_to_all(gradient_parts(gradient, kept), kept.returned());
  }
  at::Tensor finish_backward(const Kept& kept, Tensors parts) override {
    at::Tensor sum = summed(std::move(parts));
    return kept.own_gradient ? sum : at::Tensor();
  }
};

class ReduceScatter final : public GroupCollective {
 public:
  explicit ReduceScatter(std::shared_ptr<Communicator> group) : GroupCollective(std::move(group), "reduce_scatter") {}

  Launched forward(Tensors inputs, const StageContext&) override {
    auto kept = std::make_shared<Handle>();
    std::vector<Pending> parts;
    const auto ranks = static_cast<std::int64_t>(size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      check_rows(name(), i, inputs[i]);
      DUALPIPE_CHECK(!inputs[i].defined() || inputs[i].size(0) % ranks == 0, "reduce_scatter: tensor ", i, " is ",
                     show(inputs[i]), "; the ", ranks, " ranks of the group must divide its number of rows");
      kept->push_back(kept_of(inputs[i]));
      kept->back().sent = Rows(size(), inputs[i].defined() ? inputs[i].size(0) / ranks : 0);
      parts.push_back(group().all_to_all(cut(inputs[i], kept->back().sent)));
    }
    auto finish = [this, kept](std::vector<Tensors> results) {
      Tensors outputs;
      for (std::size_t i = 0; i < results.size(); ++i) {
        check_parts(name(), i, results[i], me());
        note((*kept)[i], results[i]);
        const Rows& rows = (*kept)[i].received;
        DUALPIPE_CHECK(rows == Rows(size(), rows[me()]), "reduce_scatter: ranks of the group have different numbers of",
                       " rows of tensor ", i, ": parts of ", list(rows));
        outputs.push_back(finished(summed(std::move(results[i])), (*kept)[i]));
      }
      return outputs;
    };
    Pending pending = join(std::move(parts), std::move(finish));
    return {std::move(pending), std::move(kept)};
  }

 private:
  /// All ranks have seen of all parts whether they have a gradient, so that all know whether any comes back.
  Pending launch_backward(const Kept& kept, at::Tensor gradient) override {
    const std::int64_t rows = kept.sent[me()];
    const auto& wanted = kept.wants_gradient;
    if (std::find(wanted.begin(), wanted.end(), true) == wanted.end())
      return group().all_gather({}, Signature(size(), {.defined = false, .sizes = {}}));
    if (!gradient.defined()) gradient = kept.zeros(rows);
    return group().all_gather(std::move(gradient), Signature(size(), kept.signature(rows)));
  }
  at::Tensor finish_backward(const Kept& kept, Tensors parts) override { return returned(kept, parts); }
};

}  // namespace

std::shared_ptr<Collective> all_to_all(std::shared_ptr<Communicator> group) {
  return std::make_shared<AllToAll>(std::move(group));
}
std::shared_ptr<Collective> all_gather(std::shared_ptr<Communicator> group) {
  return std::make_shared<AllGather>(std::move(group));
}
std::shared_ptr<Collective> reduce_scatter(std::shared_ptr<Communicator> group) {
  return std::make_shared<ReduceScatter>(std::move(group));
}

}  // namespace dualpipe

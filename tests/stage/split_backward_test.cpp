// Every case compares with one plain backward of the same code, bit by bit: as a whole (B) and in two parts (I, then
// W).

#include "dualpipe/stage/split_backward.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"

namespace dualpipe {
namespace {

using testing::HasSubstr;
using torch::Tensor;
using torch::indexing::Slice;

Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes, torch::kDouble); }

Tensor leaf(const Tensor& tensor) {
  return tensor.defined() ? tensor.detach().clone().set_requires_grad(tensor.requires_grad()) : tensor;
}
Tensors leaves(const Tensors& tensors) {
  Tensors result;
  for (const auto& tensor : tensors) result.push_back(leaf(tensor));
  return result;
}

/// Both undefined, or of one dtype, layout and shape with equal values.
testing::AssertionResult same(const Tensor& expected, const Tensor& actual) {
  if (expected.defined() != actual.defined()) {
    return testing::AssertionFailure() << (expected.defined() ? "undefined instead of " : "defined: ")
                                       << (expected.defined() ? expected : actual);
  }
  if (!expected.defined()) return testing::AssertionSuccess();
  if (expected.layout() != actual.layout()) return testing::AssertionFailure() << "layouts differ";
  const Tensor a = expected.is_sparse() ? expected.to_dense() : expected;
  const Tensor b = actual.is_sparse() ? actual.to_dense() : actual;
  if (a.dtype() != b.dtype()) return testing::AssertionFailure() << "dtypes differ: " << a.dtype() << ", " << b.dtype();
  if (torch::equal(a, b)) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "expected\n" << a << "\ngot\n" << b;
}

using Code = std::function<Tensors(const Tensors& inputs, const Tensors& parameters)>;

enum class How { Whole, Split, Parts };
constexpr How kHows[] = {How::Whole, How::Split, How::Parts};
const char* name_of(How how) { return how == How::Whole ? "Whole" : how == How::Split ? "Split" : "Parts"; }

/// What is left after the input part.
void run_weights(How how, BackwardGraph& graph) {
  if (how == How::Split) {
    graph.backward_weight();
  } else {
    while (graph.backward_weight_part()) {
    }
  }
}

/// Gradients of inputs and of parameters.
struct Gradients {
  Tensors inputs, parameters;
};

Tensors gradients_of(const Tensors& tensors) {
  Tensors result;
  for (const auto& tensor : tensors) result.push_back(tensor.defined() ? tensor.grad() : tensor);
  return result;
}

/// What LibTorch does in one process. Inputs enter as results, not as leaves, as an earlier layer would give them.
Gradients plain(const Code& code, const Tensors& inputs, const Tensors& parameters, const Tensors& output_gradients) {
  const Tensors x = leaves(inputs);
  Tensors entered;
  for (const auto& tensor : x) entered.push_back(tensor.defined() ? tensor.clone() : tensor);
  const Tensors outputs = code(entered, parameters);
  Tensors roots, gradients;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].defined() || !outputs[i].requires_grad() || !output_gradients[i].defined()) continue;
    roots.push_back(outputs[i]);
    gradients.push_back(output_gradients[i]);
  }
  if (!roots.empty()) torch::autograd::backward(roots, gradients);
  return {gradients_of(x), gradients_of(parameters)};
}

Gradients ours(How how, const Code& code, const Tensors& inputs, const Tensors& parameters,
               const Tensors& output_gradients) {
  const Tensors before = leaves(gradients_of(parameters));
  BackwardGraph graph;
  {
    const GraphInputs entered = enter_graph(leaves(inputs));
    graph = BackwardGraph(entered, code(entered.tensors, parameters));
  }
  Gradients result;
  if (how == How::Whole) {
    result.inputs = graph.backward(output_gradients);
  } else {
    result.inputs = graph.backward_input(output_gradients);
    const Tensors after = gradients_of(parameters);
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      EXPECT_TRUE(same(before[i], after[i])) << "I touched parameter " << i;
    }
    run_weights(how, graph);
  }
  result.parameters = gradients_of(parameters);
  return result;
}

Tensors detached(const Tensors& tensors) {
  Tensors result;
  for (const auto& tensor : tensors) result.push_back(tensor.defined() ? tensor.detach() : tensor);
  return result;
}

void expect_same(const Gradients& expected, const Gradients& actual) {
  ASSERT_EQ(expected.inputs.size(), actual.inputs.size());
  for (std::size_t i = 0; i < expected.inputs.size(); ++i) {
    EXPECT_TRUE(same(expected.inputs[i], actual.inputs[i])) << "input " << i;
  }
  for (std::size_t i = 0; i < expected.parameters.size(); ++i) {
    EXPECT_TRUE(same(expected.parameters[i], actual.parameters[i])) << "parameter " << i;
  }
}

/// Two micro-batches, so that the second one accumulates.
void compare(How how, const Code& code, const Tensors& inputs, const Tensors& parameters) {
  const Tensors expected_parameters = leaves(parameters);
  const Tensors our_parameters = leaves(parameters);
  for (int micro_batch = 0; micro_batch < 2; ++micro_batch) {
    SCOPED_TRACE("micro-batch " + std::to_string(micro_batch));
    Tensors gradients;
    {
      const torch::NoGradGuard no_grad;
      for (const auto& output : code(leaves(inputs), leaves(parameters))) {
        gradients.push_back(output.defined() && output.is_floating_point() ? torch::randn_like(output) : Tensor());
      }
    }
    const auto expected = plain(code, inputs, expected_parameters, gradients);
    expect_same(expected, ours(how, code, inputs, our_parameters, gradients));
  }
}

// A function of the C++ API that computes only what is asked for, and counts.
struct Counts {
  int inputs = 0, weights = 0;
};
struct CountedLinear : torch::autograd::Function<CountedLinear> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w, Counts* counts) {
    context->save_for_backward({x, w});
    context->saved_data["counts"] = reinterpret_cast<std::int64_t>(counts);
    return x.mm(w.t());
  }
  static Tensors backward(torch::autograd::AutogradContext* context, Tensors gradients) {
    const auto saved = context->get_saved_variables();
    auto* counts = reinterpret_cast<Counts*>(context->saved_data["counts"].toInt());
    Tensor dx, dw;
    if (context->needs_input_grad(0)) {
      if (counts != nullptr) ++counts->inputs;
      dx = gradients[0].mm(saved[1]);
    }
    if (context->needs_input_grad(1)) {
      if (counts != nullptr) ++counts->weights;
      dw = gradients[0].t().mm(saved[0]);
    }
    return {dx, dw, Tensor()};
  }
};

// Returns no gradient for its first argument.
struct StopsFirst : torch::autograd::Function<StopsFirst> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& a, const Tensor& b) { return a + b; }
  static Tensors backward(torch::autograd::AutogradContext*, Tensors gradients) { return {Tensor(), gradients[0]}; }
};

// Runs its forward again in backward, as activation checkpointing does.
struct Recomputed : torch::autograd::Function<Recomputed> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w) {
    context->save_for_backward({x, w});
    return torch::tanh(x.mm(w));
  }
  static Tensors backward(torch::autograd::AutogradContext* context, Tensors gradients) {
    const auto saved = context->get_saved_variables();
    const torch::AutoGradMode enable(true);
    const Tensor x = saved[0].detach().requires_grad_(), w = saved[1].detach().requires_grad_();
    return torch::autograd::grad({torch::tanh(x.mm(w))}, {x, w}, {gradients[0]});
  }
};

struct Case {
  std::string name;
  Code code;
  Tensors inputs, parameters;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

Tensor input(at::IntArrayRef sizes) { return random(sizes).requires_grad_(); }
Tensor parameter(at::IntArrayRef sizes) { return random(sizes).requires_grad_(); }

std::vector<Case> cases() {
  torch::manual_seed(7);
  const Tensor indices = torch::randint(0, 6, {5, 3}, torch::kLong);
  const Tensor mask = (torch::rand({5, 8}, torch::kDouble) > 0.3).to(torch::kDouble) / 0.7;
  return {
      {"mlp_gelu_residual",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {x[0] + torch::addmm(p[3], torch::gelu(torch::addmm(p[1], x[0], p[0])), p[2])};
       },
       {input({5, 4})},
       {parameter({4, 8}), parameter({8}), parameter({8, 4}), parameter({4})}},
      {"weight_twice_on_one_path",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {x[0].mm(p[0]).mm(p[0])}; },
       {input({5, 4})},
       {parameter({4, 4})}},
      {"weight_three_times",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         Tensor h = x[0];
         for (int i = 0; i < 3; ++i) h = torch::tanh(h.mm(p[0])) + h;
         return {h};
       },
       {input({5, 4})},
       {parameter({4, 4})}},
      {"weight_in_two_branches",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {torch::relu(x[0].mm(p[0])), torch::sigmoid(x[0].mm(p[0]) * 2) + x[0] * p[1]};
       },
       {input({5, 4})},
       {parameter({4, 4}), parameter({4})}},
      {"attention_from_chunks",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         const auto qkv = x[0].mm(p[0]).chunk(3, 1);
         return {torch::softmax(qkv[0].mm(qkv[1].t()), 1).mm(qkv[2]) + x[0] * p[1]};
       },
       {input({5, 4})},
       {parameter({4, 12}), parameter({4})}},
      {"layer_norm",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {torch::layer_norm(x[0], {4}, p[0], p[1]).mm(p[2])};
       },
       {input({5, 4})},
       {parameter({4}), parameter({4}), parameter({4, 4})}},
      {"batch_norm",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {torch::batch_norm(x[0], p[0], p[1], torch::zeros({4}, torch::kDouble),
                                   torch::ones({4}, torch::kDouble), true, 0.1, 1e-5, false)
                     .mm(p[2])};
       },
       {input({5, 4})},
       {parameter({4}), parameter({4}), parameter({4, 4})}},
      {"convolution",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {torch::relu(torch::conv2d(x[0], p[0], p[1], 1, 1)).mean({2, 3})};
       },
       {input({2, 3, 5, 5})},
       {parameter({4, 3, 3, 3}), parameter({4})}},
      {"lstm_cell",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         const auto [h, c] = torch::lstm_cell(x[0], {x[1], x[2]}, p[0], p[1], p[2], p[3]);
         return {h, c};
       },
       {input({5, 3}), input({5, 4}), input({5, 4})},
       {parameter({16, 3}), parameter({16, 4}), parameter({16}), parameter({16})}},
      {"derived_weight_and_parameter_only_output",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {x[0].mm(p[0] * p[1]), (p[0] * p[0]).sum(), p[1]}; },
       {input({5, 4})},
       {parameter({4, 4}), parameter({4, 4})}},
      {"low_rank_update_used_twice",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         const Tensor w = p[0] + p[1].mm(p[2]);
         return {torch::relu(x[0].mm(w)).mm(w)};
       },
       {input({5, 4})},
       {parameter({4, 4}), parameter({4, 2}), parameter({2, 4})}},
      {"frozen_base_weight",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {x[0].mm(p[0]) + x[0].mm(p[1]).mm(p[2])}; },
       {input({5, 4})},
       {random({4, 4}), parameter({4, 2}), parameter({2, 4})}},
      {"all_frozen",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {torch::relu(x[0].mm(p[0]))}; },
       {input({5, 4})},
       {random({4, 4})}},
      {"custom_function_two_by_two",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         const Tensor a = CountedLinear::apply(x[0], p[0], static_cast<Counts*>(nullptr));
         const Tensor b = CountedLinear::apply(x[1], p[0], static_cast<Counts*>(nullptr));
         return {CountedLinear::apply(torch::relu(a + b), p[1], static_cast<Counts*>(nullptr)), a * b};
       },
       {input({5, 4}), input({5, 4})},
       {parameter({4, 4}), parameter({4, 4})}},
      {"custom_function_without_any_gradient",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         // No gradient reaches the linear function, which sees zeros and gives zeros.
         return {StopsFirst::apply(CountedLinear::apply(x[0], p[0], static_cast<Counts*>(nullptr)), x[0].mm(p[1]))};
       },
       {input({5, 4})},
       {parameter({4, 4}), parameter({4, 4})}},
      {"recomputation",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {Recomputed::apply(Recomputed::apply(x[0], p[0]), p[1])};
       },
       {input({5, 4})},
       {parameter({4, 4}), parameter({4, 4})}},
      {"unused_input_and_unused_parameter",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {x[0].mm(p[0])}; },
       {input({5, 4}), input({5, 4})},
       {parameter({4, 4}), parameter({4, 4})}},
      {"embedding",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {torch::embedding(p[0], x[0]).sum(1).mm(p[1])}; },
       {indices},
       {parameter({6, 4}), parameter({4, 4})}},
      {"sparse_embedding_beside_an_input",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {torch::embedding(p[0], x[0], -1, false, /*sparse=*/true).sum(1).mm(p[1]) * x[1]};
       },
       {indices, input({5, 4})},
       {parameter({6, 4}), parameter({4, 4})}},
      {"in_place_first",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         Tensor h = x[0];
         h.mul_(p[0]).relu_();
         return {h.mm(p[1])};
       },
       {input({5, 4})},
       {parameter({4}), parameter({4, 4})}},
      {"in_place_on_a_view_of_an_input",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         x[0].index({Slice(), Slice(0, 2)}).mul_(p[0]);
         x[0].select(0, 1).add_(p[1]);
         return {x[0].mm(p[2])};
       },
       {input({5, 4})},
       {parameter({2}), parameter({4}), parameter({4, 4})}},
      {"in_place_copies_and_indexing",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         Tensor buffer = torch::zeros({5, 8}, torch::kDouble);
         buffer.index_put_({Slice(), Slice(0, 4)}, x[0].mm(p[0]));
         buffer.slice(1, 4, 8).copy_(p[1].expand({5, 4}));
         return {torch::tanh(buffer).mm(p[2])};
       },
       {input({5, 4})},
       {parameter({4, 4}), parameter({4}), parameter({8, 4})}},
      {"dropout_with_a_given_mask",
       [mask](const Tensors& x, const Tensors& p) -> Tensors { return {(torch::relu(x[0].mm(p[0])) * mask).mm(p[1])}; },
       {input({5, 4})},
       {parameter({4, 8}), parameter({8, 4})}},
      {"identity", [](const Tensors& x, const Tensors&) -> Tensors { return x; }, {input({5, 4})}, {}},
      {"view_of_the_input",
       [](const Tensors& x, const Tensors&) -> Tensors { return {x[0].t(), x[0].select(0, 1)}; },
       {input({5, 4})},
       {}},
      {"input_beside_a_result_of_it",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {x[0], x[0].mm(p[0])}; },
       {input({5, 4})},
       {parameter({4, 4})}},
      {"one_tensor_twice",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         const Tensor y = x[0].mm(p[0]);
         return {y, y};
       },
       {input({5, 4})},
       {parameter({4, 4})}},
      {"two_views_of_one_tensor",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         const auto y = x[0].mm(p[0]).chunk(2, 1);
         return {y[0], y[1]};
       },
       {input({5, 4})},
       {parameter({4, 4})}},
      {"integers_and_undefined_pass",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {x[0], x[2].defined() ? x[2] : Tensor(), x[1].mm(p[0]), x[0].argmax(1)};
       },
       {indices, input({5, 4}), Tensor()},
       {parameter({4, 4})}},
      {"inputs_that_are_not_differentiable",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {torch::relu(x[0].mm(p[0])).mm(p[1]) + x[1]}; },
       {random({5, 4}), random({5, 4})},
       {parameter({4, 4}), parameter({4, 4})}},
      {"outputs_without_gradient",
       [](const Tensors& x, const Tensors& p) -> Tensors { return {x[0].detach().mm(p[0].detach())}; },
       {input({5, 4})},
       {parameter({4, 4})}},
      {"parameters_only",
       [](const Tensors&, const Tensors& p) -> Tensors { return {p[0].mm(p[1]), p[0]}; },
       {input({5, 4})},
       {parameter({4, 4}), parameter({4, 4})}},
      {"complex",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {torch::real(torch::view_as_complex(x[0]) * torch::view_as_complex(p[0])),
                 torch::abs(torch::view_as_complex(p[0]))};
       },
       {input({5, 4, 2})},
       {parameter({4, 2})}},
      {"mixed_precision",
       [](const Tensors& x, const Tensors& p) -> Tensors {
         return {x[0].to(torch::kBFloat16).mm(p[0].to(torch::kBFloat16)).to(torch::kDouble) + x[0].to(torch::kFloat)};
       },
       {input({5, 4})},
       {parameter({4, 4})}},
  };
}

class SplitBackward : public testing::TestWithParam<Case> {};

TEST_P(SplitBackward, WholeIsBitwiseThatOfOneProcess) {
  compare(How::Whole, GetParam().code, GetParam().inputs, GetParam().parameters);
}

TEST_P(SplitBackward, InTwoPartsIsBitwiseThatOfOneProcess) {
  compare(How::Split, GetParam().code, GetParam().inputs, GetParam().parameters);
}

TEST_P(SplitBackward, InManyPartsIsBitwiseThatOfOneProcess) {
  compare(How::Parts, GetParam().code, GetParam().inputs, GetParam().parameters);
}

TEST_P(SplitBackward, InManyPartsWithoutDifferentiableInputIsBitwiseThatOfOneProcess) {
  compare(How::Parts, GetParam().code, detached(GetParam().inputs), GetParam().parameters);
}

INSTANTIATE_TEST_SUITE_P(Graphs, SplitBackward, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

/// A graph of `size` operations drawn at random, whose parameters and results are used any number of times.
Code random_code(unsigned seed, int size) {
  return [seed, size](const Tensors& x, const Tensors& p) -> Tensors {
    std::mt19937 draw(seed);
    auto pick = [&](const Tensors& from) { return from[draw() % from.size()]; };
    Tensors values = x;
    values.insert(values.end(), p.begin(), p.end());
    for (int i = 0; i < size; ++i) {
      const Tensor a = pick(values), b = draw() % 2 ? pick(p) : pick(values);
      switch (draw() % 8) {
        case 0:
          values.push_back(torch::tanh(a.mm(b)));
          break;
        case 1:
          values.push_back(a + b);
          break;
        case 2:
          values.push_back(torch::tanh(a) * b);
          break;
        case 3:
          values.push_back(torch::sigmoid(a));
          break;
        case 4:
          values.push_back(torch::cat(torch::tanh(a + b).chunk(2, 1), 1).t());
          break;
        case 5:
          values.push_back(torch::layer_norm(a, {4}, b.select(0, 0), b.select(0, 1)));
          break;
        case 6: {
          const Tensor written = a.clone();
          written.select(0, 1).mul_(b.select(0, 2));
          written.narrow(1, 2, 2).copy_(torch::tanh(b).narrow(1, 0, 2));
          values.push_back(written);
          break;
        }
        default:
          values.push_back((a * 0.5).add_(b).tanh_());
          break;
      }
    }
    Tensors outputs;
    for (int i = 0; i < 3; ++i) outputs.push_back(values[values.size() - 1 - draw() % values.size() / 3]);
    return outputs;
  };
}

TEST(SplitBackwardProperty, RandomGraphs) {
  torch::manual_seed(11);
  for (unsigned seed = 0; seed < 150 && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Tensors inputs{input({4, 4}), input({4, 4}), random({4, 4})};
    const Tensors parameters{parameter({4, 4}), parameter({4, 4}), random({4, 4})};
    const Code code = random_code(seed, 3 + static_cast<int>(seed % 40));
    for (const How how : kHows) compare(how, code, inputs, parameters);
    compare(How::Parts, code, detached(inputs), parameters);
  }
}

TEST(SplitBackwardProperty, ConcurrentThreads) {
  std::vector<std::thread> threads;
  std::vector<Tensors> expected(4), actual(4);
  for (std::size_t t = 0; t < expected.size(); ++t) {
    threads.emplace_back([t, &expected, &actual] {
      const Code code = random_code(static_cast<unsigned>(100 + t), 30);
      const Tensors parameters{parameter({4, 4}), parameter({4, 4})}, mine = leaves(parameters);
      for (int i = 0; i < 20; ++i) {
        const Tensors inputs{input({4, 4})}, gradients{random({4, 4}), random({4, 4}), random({4, 4})};
        const auto p = plain(code, inputs, parameters, gradients);
        const auto o = ours(How::Split, code, inputs, mine, gradients);
        expected[t].insert(expected[t].end(), p.inputs.begin(), p.inputs.end());
        actual[t].insert(actual[t].end(), o.inputs.begin(), o.inputs.end());
      }
      for (const auto& tensor : gradients_of(parameters)) expected[t].push_back(tensor);
      for (const auto& tensor : gradients_of(mine)) actual[t].push_back(tensor);
    });
  }
  for (auto& thread : threads) thread.join();
  for (std::size_t t = 0; t < expected.size(); ++t) {
    ASSERT_EQ(expected[t].size(), actual[t].size());
    for (std::size_t i = 0; i < expected[t].size(); ++i)
      EXPECT_TRUE(same(expected[t][i], actual[t][i])) << "thread " << t;
  }
}

TEST(SplitBackwardWork, EachHalfComputesOnlyItsOwn) {
  Counts counts;
  const Tensor w1 = parameter({4, 4}), w2 = parameter({4, 4});
  const GraphInputs entered = enter_graph({input({5, 4})});
  const Tensor y =
      CountedLinear::apply(torch::relu(CountedLinear::apply(entered.tensors[0], w1, &counts)), w2, &counts);
  BackwardGraph graph(entered, {y});
  graph.backward_input({torch::ones_like(y).detach()});
  EXPECT_EQ(counts.inputs, 2);
  EXPECT_EQ(counts.weights, 0);
  graph.backward_weight();
  EXPECT_EQ(counts.inputs, 2);
  EXPECT_EQ(counts.weights, 2);
}

TEST(SplitBackwardWork, WithoutDifferentiableInputAllIsInW) {
  Counts counts;
  const Tensor w1 = parameter({4, 4}), w2 = parameter({4, 4});
  const GraphInputs entered = enter_graph({random({5, 4})});
  EXPECT_FALSE(entered.entrance);
  const Tensor y = CountedLinear::apply(CountedLinear::apply(entered.tensors[0], w1, &counts), w2, &counts);
  BackwardGraph graph(entered, {y});
  const Tensors gradients = graph.backward_input({torch::ones_like(y).detach()});
  ASSERT_EQ(gradients.size(), 1U);
  EXPECT_FALSE(gradients[0].defined());
  EXPECT_EQ(counts.inputs + counts.weights, 0);
  graph.backward_weight();
  EXPECT_EQ(counts.inputs, 1);
  EXPECT_EQ(counts.weights, 2);
}

/// Runs the parts one by one, and says how many weight and input gradients each computed.
std::vector<std::pair<int, int>> parts_of(BackwardGraph& graph, const Counts& counts) {
  std::vector<std::pair<int, int>> parts;
  for (bool more = true; more;) {
    const int weights = counts.weights, inputs = counts.inputs;
    more = graph.backward_weight_part();
    parts.emplace_back(counts.weights - weights, counts.inputs - inputs);
  }
  return parts;
}

TEST(SplitBackwardWork, PartsShareNoOperation) {
  Counts counts;
  const Tensor w1 = parameter({4, 4}), w2 = parameter({4, 4}), w3 = parameter({4, 4});
  const auto linear = [&](const Tensor& x, const Tensor& w) { return CountedLinear::apply(x, w, &counts); };
  const auto chain = [&](const Tensor& x, const Tensor& last) {
    const GraphInputs entered = enter_graph({x});
    const Tensor y = linear(linear(linear(entered.tensors[0], w1), w2), last);
    BackwardGraph graph(entered, {y});
    graph.backward_input({torch::ones_like(y).detach()});
    return graph;
  };
  using Parts = std::vector<std::pair<int, int>>;  // weight gradients, input gradients
  BackwardGraph separate = chain(input({5, 4}), w3);
  EXPECT_EQ(parts_of(separate, counts), (Parts{{1, 0}, {1, 0}, {1, 0}}));
  BackwardGraph shared = chain(input({5, 4}), w1);
  EXPECT_EQ(parts_of(shared, counts), (Parts{{1, 0}, {2, 0}})) << "both layers accumulate into one gradient";
  BackwardGraph first_stage = chain(random({5, 4}), w3);
  EXPECT_EQ(parts_of(first_stage, counts), (Parts{{1, 2}, {1, 0}, {1, 0}})) << "what leads to the first layer, first";
}

TEST(SplitBackwardWork, OneOperationWithParametersRunsOnce) {
  Counts counts;
  const Tensor w = parameter({4, 4});
  const GraphInputs entered = enter_graph({random({5, 4})});
  BackwardGraph graph(entered, {torch::tanh(CountedLinear::apply(entered.tensors[0], w, &counts))});
  graph.backward_input({random({5, 4})});
  EXPECT_FALSE(graph.backward_weight_part());
  EXPECT_EQ(counts.weights, 1);
}

TEST(SplitBackwardWork, HooksOfAFirstStageFireOnceInParts) {
  const Tensors w{parameter({4, 4}), parameter({4, 4}), parameter({4, 4})};
  std::vector<int> on_parameters(w.size(), 0);
  for (std::size_t i = 0; i < w.size(); ++i) {
    w[i].register_hook([&on_parameters, i](const Tensor&) { ++on_parameters[i]; });
  }
  int on_results = 0;
  const GraphInputs entered = enter_graph({random({5, 4})});
  Tensor y = entered.tensors[0];
  for (const Tensor& weight : w) {
    y = torch::tanh(y.mm(weight));
    y.register_hook([&](const Tensor& gradient) { return ++on_results, gradient * 2; });
  }
  BackwardGraph graph(entered, {y});
  const Tensor g = random({5, 4});
  graph.backward_input({g});
  run_weights(How::Parts, graph);
  EXPECT_EQ(on_parameters, (std::vector<int>{1, 1, 1}));
  EXPECT_EQ(on_results, 3);
}

TEST(SplitBackwardWork, PartsCanBeLeftToOneCall) {
  const Tensor w1 = parameter({4, 4}), w2 = parameter({4, 4});
  const GraphInputs entered = enter_graph({input({5, 4})});
  BackwardGraph graph(entered, {entered.tensors[0].mm(w1).mm(w2)});
  graph.backward_input({random({5, 4})});
  EXPECT_TRUE(graph.backward_weight_part());
  EXPECT_TRUE(w2.grad().defined());
  EXPECT_FALSE(w1.grad().defined());
  graph.backward_weight();
  EXPECT_TRUE(w1.grad().defined());
  EXPECT_THROW(graph.backward_weight_part(), Error);
}

class Hooks : public testing::TestWithParam<How> {
 protected:
  static Tensors run(BackwardGraph& graph, const Tensors& gradients) {
    if (GetParam() == How::Whole) return graph.backward(gradients);
    Tensors result = graph.backward_input(gradients);
    run_weights(GetParam(), graph);
    return result;
  }
};

TEST_P(Hooks, OnParametersFireOncePerMicroBatch) {
  const Tensor w = parameter({4, 4});
  int calls = 0;
  w.register_hook([&](const Tensor& gradient) {
    ++calls;
    return gradient * 3;
  });
  Tensor expected;
  for (int micro_batch = 1; micro_batch <= 3; ++micro_batch) {
    const Tensor x = input({5, 4}), g = random({5, 4});
    const GraphInputs entered = enter_graph({x});
    BackwardGraph graph(entered, {entered.tensors[0].mm(w).mm(w)});
    run(graph, {g});
    EXPECT_EQ(calls, micro_batch);
    const Tensor plain_w = leaf(w);
    x.mm(plain_w).mm(plain_w).backward(g);
    expected = expected.defined() ? expected + plain_w.grad() * 3 : plain_w.grad() * 3;
    EXPECT_TRUE(torch::allclose(expected, w.grad(), 1e-13));
  }
}

TEST_P(Hooks, OnResultsFireOnceAndChangeBothHalves) {
  const Tensor w = parameter({4, 4}), x = input({5, 4}), g = random({5, 4});
  int calls = 0;
  auto code = [&](const Tensor& entered, const Tensor& weight) {
    const Tensor h = entered.mm(weight);
    h.register_hook([&](const Tensor& gradient) {
      ++calls;
      return gradient * 2;
    });
    h.retain_grad();
    return std::pair(h, torch::tanh(h));
  };
  const Tensor plain_w = leaf(w), plain_x = leaf(x);
  const auto [plain_h, plain_y] = code(plain_x, plain_w);
  plain_y.backward(g);
  ASSERT_EQ(calls, 1);

  calls = 0;
  const GraphInputs entered = enter_graph({x});
  const auto [h, y] = code(entered.tensors[0], w);
  BackwardGraph graph(entered, {y});
  const Tensors gradients = run(graph, {g});
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(same(plain_x.grad(), gradients[0]));
  EXPECT_TRUE(same(plain_w.grad(), w.grad()));
  EXPECT_TRUE(same(plain_h.grad(), h.grad()));
}

TEST_P(Hooks, OnInputsAndOnOutputsFireOnce) {
  const Tensor w = parameter({4, 4}), x = input({5, 4}), g = random({5, 4});
  int calls = 0;
  const GraphInputs entered = enter_graph({x});
  entered.tensors[0].register_hook([&](const Tensor& gradient) {
    ++calls;
    return gradient * 2;
  });
  const Tensor y = entered.tensors[0].mm(w);
  y.register_hook([&](const Tensor& gradient) {
    ++calls;
    return gradient * 5;
  });
  BackwardGraph graph(entered, {y});
  const Tensors gradients = run(graph, {g});
  EXPECT_EQ(calls, 2);
  EXPECT_TRUE(same((g * 5).mm(w.detach().t()) * 2, gradients[0]));
  EXPECT_TRUE(same(x.detach().t().mm(g * 5), w.grad()));
}

TEST_P(Hooks, BehindAccumulationFireOnce) {
  struct Count : torch::autograd::PostAccumulateGradHook {
    explicit Count(int& count) : calls(count) {}
    void operator()(const Tensor&) override { ++calls; }
    int& calls;
  };
  const Tensor w = parameter({4, 4});
  int calls = 0;
  torch::autograd::impl::set_post_acc_grad_hooks(w, std::make_unique<Count>(calls));
  const GraphInputs entered = enter_graph({input({5, 4})});
  BackwardGraph graph(entered, {entered.tensors[0].mm(w).mm(w)});
  run(graph, {random({5, 4})});
  EXPECT_EQ(calls, 1);
}

INSTANTIATE_TEST_SUITE_P(All, Hooks, testing::ValuesIn(kHows), [](const auto& test) { return name_of(test.param); });

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;
WeakStorage watch(const Tensor& tensor) {
  return WeakStorage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(tensor.storage().unsafeGetStorageImpl()));
}

/// x -> a = x w1 -> h = gelu(a) -> y = h w2: a is needed by the input gradients alone, h by the weight gradients alone.
struct WatchedGraph {
  Tensor w1 = parameter({16, 16}), w2 = parameter({16, 16});
  BackwardGraph graph;
  WeakStorage pre_activation, hidden, entered;

  explicit WatchedGraph(const Tensor& x)
      : pre_activation(watch(torch::empty({1}))), hidden(pre_activation), entered(pre_activation) {
    const GraphInputs inputs = enter_graph({x});
    const Tensor a = inputs.tensors[0].mm(w1), h = torch::gelu(a);
    pre_activation = watch(a);
    hidden = watch(h);
    entered = watch(x);
    graph = BackwardGraph(inputs, {h.mm(w2)});
  }
};

TEST(SplitBackwardMemory, EachHalfFreesWhatOnlyItNeeded) {
  WatchedGraph watched(input({16, 16}));
  EXPECT_FALSE(watched.pre_activation.expired());
  EXPECT_FALSE(watched.hidden.expired());
  watched.graph.backward_input({random({16, 16})});
  EXPECT_TRUE(watched.pre_activation.expired());
  EXPECT_FALSE(watched.hidden.expired());
  EXPECT_FALSE(watched.entered.expired());
  watched.graph.backward_weight();
  EXPECT_TRUE(watched.hidden.expired());
  EXPECT_TRUE(watched.entered.expired());
}

TEST(SplitBackwardMemory, WholeFreesAll) {
  WatchedGraph watched(input({16, 16}));
  watched.graph.backward({random({16, 16})});
  EXPECT_TRUE(watched.pre_activation.expired());
  EXPECT_TRUE(watched.hidden.expired());
  EXPECT_TRUE(watched.entered.expired());
}

TEST(SplitBackwardMemory, DroppedGraphFreesAll) {
  for (const bool after_input : {false, true}) {
    WatchedGraph watched(input({16, 16}));
    if (after_input) watched.graph.backward_input({random({16, 16})});
    watched.graph = BackwardGraph();
    EXPECT_TRUE(watched.pre_activation.expired());
    EXPECT_TRUE(watched.hidden.expired());
    EXPECT_TRUE(watched.entered.expired());
  }
}

TEST(SplitBackwardMemory, InputGradientsAreNotHeld) {
  WatchedGraph watched(input({16, 16}));
  WeakStorage given = [&] { return watch(watched.graph.backward_input({random({16, 16})})[0]); }();
  EXPECT_TRUE(given.expired());
}

TEST(SplitBackwardMemory, AVeryDeepGraphNeedsNoDeepStack) {
  const Tensor w = parameter({1});
  const GraphInputs entered = enter_graph({input({1})});
  Tensor h = entered.tensors[0];
  for (int i = 0; i < 50'000; ++i) h = i % 2 ? h + w : h * 1.0;
  BackwardGraph graph(entered, {h});
  h = Tensor();
  EXPECT_EQ(graph.backward_input({torch::ones({1}, torch::kDouble)})[0].item<double>(), 1);
  graph.backward_weight();
  EXPECT_EQ(w.grad().item<double>(), 25'000);
}

/// A parameter's first gradient is adopted, not copied: it must not be memory that was given away as an input gradient.
TEST(SplitBackwardMemory, ParametersDoNotAdoptInputGradients) {
  for (const How how : kHows) {
    SCOPED_TRACE(name_of(how));
    const Tensor bias = parameter({4});
    auto run = [&](const Tensor& g) {
      const GraphInputs entered = enter_graph({input({1, 4})});
      BackwardGraph graph(entered, {entered.tensors[0] + bias.unsqueeze(0)});
      Tensors gradients = how == How::Whole ? graph.backward({g}) : graph.backward_input({g});
      if (how != How::Whole) run_weights(how, graph);
      return gradients[0];
    };
    const Tensor given = run(random({1, 4}) * 1);
    const Tensor copy = given.clone();
    run(random({1, 4}) * 1);
    EXPECT_TRUE(same(copy, given)) << "changed by the next micro-batch's accumulation";
  }
}

struct Fails : torch::autograd::Function<Fails> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w) {
    context->save_for_backward({x, w});
    return x * w;
  }
  static Tensors backward(torch::autograd::AutogradContext* context, Tensors gradients) {
    if (context->needs_input_grad(1)) throw std::runtime_error("no weight gradient today");
    return {gradients[0], Tensor(), Tensor()};
  }
};

TEST(SplitBackwardErrors, AThrowingBackwardLeavesNoMemoryAndNoSecondUse) {
  for (const How how : kHows) {
    const Tensor w = parameter({4, 4});
    WeakStorage hidden = watch(w);
    BackwardGraph graph;
    {
      const GraphInputs entered = enter_graph({input({4, 4})});
      const Tensor h = torch::tanh(entered.tensors[0].mm(w));
      hidden = watch(h);
      graph = BackwardGraph(entered, {torch::tanh(Fails::apply(h, w))});
    }
    const Tensors g{random({4, 4})};
    if (how != How::Whole) {
      graph.backward_input(g);
      EXPECT_FALSE(hidden.expired());
      EXPECT_THROW(run_weights(how, graph), std::runtime_error);
      EXPECT_THROW(run_weights(how, graph), Error);
    } else {
      EXPECT_THROW(graph.backward(g), std::runtime_error);
      EXPECT_THROW(graph.backward(g), Error);
    }
    EXPECT_TRUE(hidden.expired());
  }
}

TEST(SplitBackwardErrors, AThrowingFirstPartOfAFirstStageLeavesNoMemory) {
  const Tensor w1 = parameter({4, 4}), w2 = parameter({4, 4});
  WeakStorage hidden = watch(w1);
  BackwardGraph graph;
  {
    const GraphInputs entered = enter_graph({random({4, 4})});
    const Tensor h = torch::tanh(Fails::apply(entered.tensors[0], w1));
    hidden = watch(h);
    graph = BackwardGraph(entered, {torch::tanh(h.mm(w2))});
  }
  graph.backward_input({random({4, 4})});
  EXPECT_THROW(graph.backward_weight_part(), std::runtime_error);
  EXPECT_THROW(graph.backward_weight_part(), Error);
  EXPECT_TRUE(hidden.expired());
}

TEST(SplitBackwardErrors, WrongOrderOfCallsIsNamed) {
  auto make = [] {
    const GraphInputs entered = enter_graph({input({4, 4})});
    return BackwardGraph(entered, {torch::tanh(entered.tensors[0])});
  };
  auto message = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const Error& error) {
      return error.what();
    }
    return "nothing thrown";
  };
  const Tensors g{random({4, 4})};
  BackwardGraph graph = make();
  EXPECT_THAT(message([&] { graph.backward_weight(); }), HasSubstr("before backward_input"));
  EXPECT_THAT(message([&] { graph.backward({}); }), HasSubstr("1 outputs, got 0 gradients"));
  graph.backward_input(g);
  EXPECT_THAT(message([&] { graph.backward_input(g); }), HasSubstr("backward_input called again"));
  EXPECT_THAT(message([&] { graph.backward(g); }), HasSubstr("backward called again"));
  graph.backward_weight();
  EXPECT_THAT(message([&] { graph.backward_weight(); }), HasSubstr("called again"));
  graph = make();
  graph.backward(g);
  EXPECT_THAT(message([&] { graph.backward_weight(); }), HasSubstr("left nothing"));
}

TEST(SplitBackwardErrors, UndefinedOutputGradientsLetNothingFlow) {
  const Tensor w = parameter({4, 4});
  const GraphInputs entered = enter_graph({input({4, 4})});
  BackwardGraph graph(entered, {entered.tensors[0].mm(w)});
  EXPECT_FALSE(graph.backward_input({Tensor()})[0].defined());
  graph.backward_weight();
  EXPECT_FALSE(w.grad().defined());
}

TEST(EnterGraph, SharesMemoryAndVersionAndLeavesTheCallersTensorsAlone) {
  const Tensor x = input({4, 4}), integers = torch::arange(3);
  const GraphInputs entered = enter_graph({x, integers, Tensor()});
  ASSERT_EQ(entered.tensors.size(), 3U);
  EXPECT_TRUE(entered.tensors[0].is_alias_of(x));
  EXPECT_TRUE(entered.tensors[0].requires_grad());
  EXPECT_FALSE(entered.tensors[0].is_leaf());
  EXPECT_FALSE(entered.tensors[1].requires_grad());
  EXPECT_FALSE(entered.tensors[2].defined());
  const auto version = x._version();
  entered.tensors[0].mul_(2);
  EXPECT_GT(x._version(), version);
  EXPECT_TRUE(x.is_leaf());

  // A tensor that is not differentiable gets no history when user code writes differentiable values into it.
  const Tensor batch = random({4, 4});
  const GraphInputs again = enter_graph({batch.narrow(0, 0, 2)});
  again.tensors[0].mul_(parameter({4}));
  EXPECT_TRUE(again.tensors[0].requires_grad());
  EXPECT_FALSE(batch.requires_grad());
}

TEST(EnterGraph, WithoutGradientsNothingIsDifferentiable) {
  const torch::NoGradGuard no_grad;
  const GraphInputs entered = enter_graph({input({4, 4})});
  EXPECT_FALSE(entered.entrance);
  EXPECT_FALSE(entered.tensors[0].requires_grad());
}

/// In place is refused exactly where one process refuses it: where the old value is needed.
TEST(EnterGraph, RefusesInPlaceWritesToSavedValues) {
  for (const How how : {How::Whole, How::Split}) {
    const Tensor w = parameter({4, 4});
    const GraphInputs entered = enter_graph({input({4, 4})});
    const Tensor y = entered.tensors[0].mm(w);
    entered.tensors[0].mul_(2);
    BackwardGraph graph(entered, {y});
    auto run = [&] {
      if (how == How::Whole) {
        graph.backward({random({4, 4})});
      } else {
        graph.backward_input({random({4, 4})});
        graph.backward_weight();
      }
    };
    EXPECT_THROW(run(), c10::Error);
  }
  // The tensor entered counts as well: a receiver that reused its buffer would be noticed.
  const Tensor received = input({4, 4}), w = parameter({4, 4});
  const GraphInputs entered = enter_graph({received});
  BackwardGraph graph(entered, {entered.tensors[0].mm(w)});
  received.detach().zero_();
  EXPECT_THROW(graph.backward({random({4, 4})}), c10::Error);
}

TEST(BackwardThread, IsTheCallersAndTheSettingIsRestored) {
  const auto caller = std::this_thread::get_id();
  bool same_thread = true, multithreading = true;
  const GraphInputs entered = enter_graph({input({4, 4})});
  const Tensor y = entered.tensors[0] * parameter({4, 4});
  y.register_hook([&](const Tensor& gradient) {
    same_thread = same_thread && std::this_thread::get_id() == caller;
    multithreading = c10::AutogradState::get_tls_state().get_multithreading_enabled();
    return gradient;
  });
  BackwardGraph graph(entered, {y});
  graph.backward_input({random({4, 4})});
  EXPECT_TRUE(same_thread);
  EXPECT_FALSE(multithreading);
  EXPECT_TRUE(c10::AutogradState::get_tls_state().get_multithreading_enabled());
}

}  // namespace
}  // namespace dualpipe
